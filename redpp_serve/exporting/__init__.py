"""The way out of a package: as a trainable module, as other programs' files, and back in after fine-tuning."""
