"""mlx-vlm's own command with the published prompt: ``python -m benchmarks.peer_command``.

Everything else is mlx-vlm's: imports, flags, loading and output.
"""

import sys
from pathlib import Path


def main() -> None:
    from mlx_vlm.generate import dispatch

    folder = Path(sys.argv[sys.argv.index("--model") + 1])

    def published(*_: object, num_images: int, **__: object) -> str:
        from benchmarks.prompt import published_prompt

        return published_prompt(folder, num_images)

    dispatch.apply_chat_template = published
    dispatch.main()


if __name__ == "__main__":
    main()
