"""PAD training on top of the kernels: phases, trainer, evaluation, export and report."""
