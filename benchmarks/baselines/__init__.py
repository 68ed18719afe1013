"""What the quality benchmark compares with: peers' libraries, published methods written from their papers, and ours."""
