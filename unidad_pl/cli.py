"""`unidad`: the command line."""

from __future__ import annotations


def main() -> None:
    from lightning.pytorch.cli import LightningCLI
    import lightning.pytorch as pl

    LightningCLI(pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)


if __name__ == "__main__":
    main()
