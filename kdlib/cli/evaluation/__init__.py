"""The kinds of ``kdlib evaluate``: problems, tasks, rows of text, acceptance, Jacobi and diffusion decoding."""
