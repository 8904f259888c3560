"""One loss per file, with its formula, shapes and source. They use tensor methods only and import no torch."""
