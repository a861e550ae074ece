"""Run VLMEvalKit's program with internvl3-mlx among its models."""

import argparse
import runpy
import sys
from functools import partial


def main() -> None:
    """Add the model to VLMEvalKit's table under a name, and hand everything else to its run.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-path", default="2b", help="folder, repository or size")
    parser.add_argument("--q-bits", type=int, help="bits of the language model")
    options, others = parser.parse_known_args()
    try:
        from vlmeval.config import supported_VLM
    except ImportError:
        sys.exit("VLMEvalKit is not installed: pip install -e . in its checkout")
    from examples.vlmevalkit.adapter import InternVL3MLX

    name = f"InternVL3-MLX-{options.model_path.strip('/').rpartition('/')[2]}"
    supported_VLM[name] = partial(
        InternVL3MLX, model_path=options.model_path, q_bits=options.q_bits
    )
    sys.argv = ["run.py", "--model", name, *others]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
