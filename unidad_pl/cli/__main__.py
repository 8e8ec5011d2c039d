"""``python -m unidad_pl.cli`` is ``unidad``, for ``torchrun``."""

from unidad_pl.cli.main import main

main()
