"""One module per model family. Facts about a model (names, sizes, defaults, rules) live here and nowhere else."""
