// Sorting is an extra: without scripts the table stays in network order and loses nothing.
for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button"; button.append(...head.childNodes); head.append(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending", body = head.closest("table").tBodies[0];
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[head.cellIndex].dataset.v ?? "", sign = up ? 1 : -1;
    const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") : sign * order(a, b);
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}
