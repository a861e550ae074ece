"""Run the command line: ``python -m internvl3_mlx``."""

from internvl3_mlx.cli.main import run

if __name__ == "__main__":
    run()
