"""What every test starts from: a cache folder of its own; nothing of the user's is touched."""

import os
import signal

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # float32 on every GPU; MLX reads it at its first product
# of torch, which reads it when it is loaded: there is a process for each core, and a second thread
# waits for the first by spinning, thirty times longer than a tiny model takes
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell leaves it so for what runs in its background, and processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def kernel_mode_is_read_anew(monkeypatch):
    """Read INTERNVL3_KERNELS at every question, since tests set it."""
    from internvl3_mlx.metal_kernels import dispatch

    monkeypatch.setattr(dispatch, "kernel_mode", dispatch.read_kernel_mode)


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL3_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("INTERNVL3_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("INTERNVL3_CONFIG", os.devnull)
        yield


@pytest.fixture(scope="module")
def vlm():
    """Load a tiny model with random weights, one for each file of tests."""
    from fixtures.loaded_models import tiny
    from fixtures.tiny import Recipe

    from internvl3_mlx import load

    return load(str(tiny(Recipe()).folder))


@pytest.fixture
def cheap_drafts(monkeypatch):
    """Let models draft that are as large as those they draft for."""
    from internvl3_mlx.generation import runner

    monkeypatch.setattr(runner, "draft_cost", lambda *_: 0.1)
