"""Recognize formats that are not ours by name, and say what to take instead.

Three things tell a format: what config.json says about quantization, how the tensors are called,
and which files lie in the folder. Each is a table below.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl3_mlx.config.published import size_in
from internvl3_mlx.errors import CheckpointError, ConfigError
from internvl3_mlx.json_files import LFS_HEAD, lfs_pointer_error, read_json_leniently

APPLE_DOUBLE = "._"  # macOS writes these beside every file on exFAT and network disks
GGUF_HEAD = b"GGUF"
TEXT_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")  # a model's files besides its weights

QUANTIZATION_METHODS = {  # quant_method in config.json -> what people call it
    "awq": "AWQ",
    "gptq": "GPTQ",
    "gptq_marlin": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "modelopt": "NVIDIA ModelOpt",
    "hqq": "HQQ",
    "torchao": "torchao",
    "quanto": "Quanto",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "quark": "AMD Quark",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "gguf": "GGUF",
}
METHOD_KEYS = {  # a key of a quantization config that names no method -> the method
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "_load_in_4bit": "bitsandbytes",
    "_load_in_8bit": "bitsandbytes",
    "bnb_4bit_quant_type": "bitsandbytes",
    "desc_act": "GPTQ",
    "w_bit": "AWQ",
    "quant_algo": "NVIDIA ModelOpt",
    "config_groups": "compressed-tensors",
    "weight_quant_params": "HQQ",
}
METHOD_FILES = {  # a file that a tool writes beside the weights -> the method
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quanto_qmap.json": "Quanto",
}
TENSOR_ENDINGS = {  # the last part of a tensor's name -> the method, the more telling first
    "g_idx": "GPTQ",
    "qzeros": "AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "W_q": "HQQ",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8",
    "_qdata": "torchao",
    "weight_qdata": "torchao",
    "qweight": "AWQ or GPTQ",
}
FP8_TYPES = ("F8_E4M3", "F8_E5M2")
SUFFIXES = {  # of a file -> what it is
    ".gguf": "GGUF, the format of llama.cpp",
    ".ggml": "GGML, an old format of llama.cpp",
    ".parquet": "Parquet, a format of data sets",
    ".arrow": "Arrow, a format of data sets",
    ".onnx": "ONNX",
    ".npz": "a NumPy archive",
    ".h5": "TensorFlow's or Keras's format",
    ".msgpack": "Flax's format",
    ".distcp": "a distributed checkpoint of PyTorch",
    ".pth": "a PyTorch file of an unknown layout",
    ".ckpt": "a PyTorch Lightning checkpoint",
    ".mlpackage": "Core ML",
    ".zip": "an archive; unpack it first",
}
DATA_SUFFIXES = (".parquet", ".arrow")
CACHE_ROOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")


def check_quantization_method(content: Mapping[str, Any], folder: Path | None = None) -> None:
    """Raise ConfigError if any level of a config.json says that another tool quantized the model.

    A table of MLX itself, ``quantization``, decides where there is one; GPT-OSS's own mxfp4 is
    MLX's, too.
    """
    if isinstance(content.get("quantization"), Mapping) or stores_mxfp4(content):
        return
    found = next(filter(None, map(find_method, quantization_tables(content))), None)
    if found is None and folder is not None:
        found = next((m for name, m in METHOD_FILES.items() if (folder / name).is_file()), None)
    if found is not None:
        raise ConfigError(refusal(found, folder, content))


def quantization_tables(content: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Yield the quantization configs of a config.json, of the parts' configs too."""
    for level in (content, *content.values()):
        if isinstance(level, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(level.get(key), Mapping):
                    yield level[key]


def stores_mxfp4(content: Mapping[str, Any]) -> bool:
    """Tell whether the experts are stored in mxfp4, as GPT-OSS's original weights are."""
    methods = [str(table.get("quant_method")).lower() for table in quantization_tables(content)]
    return "mxfp4" in methods and {*methods} == {"mxfp4"}


def find_method(table: Mapping[str, Any]) -> str | None:
    """Name the method of a quantization config and its bits; None for one of MLX."""
    method = table.get("quant_method")
    name = QUANTIZATION_METHODS.get(str(method).lower(), str(method)) if method else None
    if name is None or name == "mlx":
        name = next((m for key, m in METHOD_KEYS.items() if table.get(key)), None)
    bits = table.get("bits") or table.get("w_bit")
    return f"{name} ({bits} bits)" if name and isinstance(bits, int) else name


def check_tensor_names(tensors: Mapping[str, str], folder: Path) -> None:
    """Raise CheckpointError if the tensors are those of another tool's quantization.

    tensors: names and safetensors' data types.
    """
    endings = {name.rpartition(".")[2] for name in tensors}
    method = next((m for ending, m in TENSOR_ENDINGS.items() if ending in endings), None)
    if method is None and any(dtype in FP8_TYPES for dtype in tensors.values()):
        method = "FP8"
    if method is not None:
        content = read_json_leniently(folder / "config.json")
        told = next(filter(None, map(find_method, quantization_tables(content))), None)
        raise CheckpointError(refusal(told or method, folder, content))


def refusal(method: str, folder: Path | None, content: Mapping[str, Any]) -> str:
    """Say that the model cannot be used, and name the one to take."""
    where = f"{folder} is" if folder is not None else "the model is"
    return f"{where} quantized with {method}, which MLX cannot run; {what_to_take(folder, content)}"


def what_to_take(folder: Path | None, content: Mapping[str, Any]) -> str:
    """Name the 16-bit repository or the size to take instead, by the names a model goes by."""
    names = (str(folder.resolve()) if folder else "", str(content.get("_name_or_path", "")))
    for size in filter(None, map(size_in, names)):
        return f"take the 16-bit model (--model {size.name}) and quantize it with --q-bits"
    return "take the 16-bit repository it was made from, or a size such as --model 2b"


def check_layout_names(layout: str, names: Iterable[str]) -> None:
    """Raise CheckpointError if config.json and the weights are of different layouts."""
    theirs = {"hf": ("mlp1.", "vision_model."), "original": HF_PREFIXES, "mlx": HF_PREFIXES}
    titles = ("the hf layout (transformers)", "the original layout (OpenGVLab)")
    config, weights = titles if layout == "hf" else titles[::-1]
    for name in names:
        if name.removeprefix("base_model.model.").startswith(theirs[layout]):
            raise CheckpointError(
                f"config.json is of {config}, but the weights are of {weights}: {name}; "
                "take both from one repository"
            )


HF_PREFIXES = (
    *("model.vision_tower.", "model.multi_modal_projector."),
    *("vision_tower.", "multi_modal_projector."),
)


def describe_file(path: Path) -> str | None:
    """Say what a file is if it is of a format that we do not read, and what to take instead."""
    if is_lfs_pointer(path):
        return str(lfs_pointer_error(path))
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None and starts_with(path, GGUF_HEAD):
        kind = SUFFIXES[".gguf"]
    if kind is None:
        return None
    if path.suffix.lower() in DATA_SUFFIXES:
        return f"{path} is {kind}, not a model; {what_to_take(None, {})}"
    return f"{path} is {kind}, which cannot be used here; {what_to_take(path, {})}"


def describe_folder(folder: Path) -> str | None:
    """Say what a folder is if it is not a model's folder but holds a known format."""
    if (match := CACHE_ROOT.fullmatch(folder.resolve().name)) and (folder / "snapshots").is_dir():
        snapshots = sorted(p for p in (folder / "snapshots").iterdir() if p.is_dir())
        inside = f", or the folder {snapshots[-1]}" if snapshots else ""
        return (
            f"{folder} is the hub's cache of {match['owner']}/{match['name']}, not the model's "
            f"folder; name the repository itself{inside}"
        )
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        return (
            f"{folder} holds a DeepSpeed checkpoint; run its zero_to_fp32.py where it was trained "
            "and take the folder that this writes"
        )
    return describe_names(str(folder), (path.name for path in visible_files(folder, "*")), folder)


def describe_names(where: str, names: Iterable[str], folder: Path | None = None) -> str | None:
    """Say which known format the names of a folder's or a repository's files are of, if any."""
    for name in names:
        suffix = Path(name).suffix.lower()
        if kind := SUFFIXES.get(suffix):
            advice = what_to_take(folder, {"_name_or_path": where})
            if suffix in DATA_SUFFIXES:
                advice = f"as training data it goes to train --data; as a model {advice}"
            return f"{where} holds no safetensors weights but {name}, which is {kind}; {advice}"
    return None


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """List a folder's files by name, without those that macOS makes for itself (``._model``)."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(APPLE_DOUBLE))


def check_no_pointers(folder: Path) -> None:
    """Raise CheckpointError if a small file of a model was not fetched by Git LFS."""
    for pattern in TEXT_PATTERNS:
        for path in visible_files(folder, pattern):
            if is_lfs_pointer(path):
                raise lfs_pointer_error(path)


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer, the text that stands for a large file."""
    return starts_with(path, LFS_HEAD)


def starts_with(path: Path, head: bytes) -> bool:
    """Tell whether a regular file begins with some bytes."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(head)) == head
    except OSError:
        return False
