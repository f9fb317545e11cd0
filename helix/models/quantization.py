"""Which weights of a checkpoint are quantised, and how: its `quantization_config`, read without transformers.

Three formats of 8-bit floats (e4m3) are read. "fp8" is that of DeepSeek-V3 and of Qwen3's FP8 files: one scale for each
block of 128 x 128 elements, in `X.weight_scale_inv` (arXiv 2412.19437, section 3.3); or one for a matrix, there or, in
AutoFP8's files, in `X.weight_scale`. "compressed-tensors" has one scale in `X.weight_scale` for a matrix, for each of
its rows, or for such blocks; "modelopt" one for a matrix or for each of its rows. Any of them is what values are
multiplied by, and leaves embeddings, norms and routers as they are, and most often the output head. Scales of
activations are not used: rows that meet 8 bits are quantised as they come.
"""

import fnmatch
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

BLOCK = 128  # rows and columns that share a scale, counted from the beginning of the whole matrix
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")  # safetensors' names; the last holds powers of two
FORMATS = (
    "Helix reads weights of 16 and 32 bits, fp8 (e4m3, scales of blocks of 128 x 128 or of matrices), float-quantized "
    "compressed-tensors and FP8 of modelopt: take the model in one of these"
)
GRAINS = ("block", "channel", "tensor")
REFUSED = {  # what people call it, by format
    "pack-quantized": "int4 or int8 weights",
    "int-quantized": "int8 weights",
    "naive-quantized": "naive weights",
    "nvfp4-pack-quantized": "NVFP4 weights",
    "mxfp4-pack-quantized": "MXFP4 weights",
    "marlin-24": "sparse int4 weights",
}
MODELOPT_GRAINS = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel"}  # by quant_algo


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a checkpoint's layers are quantised.

    grain: what shares a scale: a "block" of BLOCK x BLOCK, a "channel" (a row), or a "tensor".
    scale_suffix: what a scale's tensor name ends in, instead of "weight".
    kept: patterns of modules that are not quantised: a regular expression at the beginning of the module's name, up to
        a dot, or its end to the letter. exact: only whole names count, and expressions begin with "re:".
    caches_in_8_bits: whether keys and values are meant to be cached in 8 bits.
    powers_of_two: whether scales that the runtime makes are powers of two, as the file's are (ue8m0).
    head: whether the output head is quantised too: where a config of "fp8" lists what is not, without it, until the
        files' tensors say so themselves (``named_as_stored``).
    """

    grain: str = "block"
    scale_suffix: str = "weight_scale_inv"
    kept: tuple[str, ...] = ()
    exact: bool = False
    caches_in_8_bits: bool = False
    powers_of_two: bool = False
    head: bool = False

    def covers(self, name: str) -> bool:
        """Return whether the tensor `name`, a linear layer's weight, is quantised."""
        module = name.removesuffix(".weight")
        if self.exact:
            return module not in self.kept and not self._beginning.match(module)
        return not (module.endswith(self.kept) or self._beginning.match(module))

    @cached_property
    def _beginning(self) -> re.Pattern[str]:
        if self.exact:
            patterns = [pattern.removeprefix("re:") for pattern in self.kept if pattern.startswith("re:")]
        else:
            patterns = [rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))" for pattern in self.kept]
        try:
            return re.compile("|".join(patterns) or r"(?!)")
        except re.error as error:
            raise ValueError(
                f"config quantization_config: a module to keep is no regular expression ({error})"
            ) from error

    def scale_of(self, name: str) -> str:
        """Return the name of the scale of the tensor `name`."""
        return name.removesuffix("weight") + self.scale_suffix

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that the scale of a matrix of this `shape` may have; the first is the usual one."""
        rows, columns = shape
        if self.grain == "block":
            return ((num_blocks(0, rows), num_blocks(0, columns)),)
        return ((rows, 1), (rows,)) if self.grain == "channel" else ((1,), (), (1, 1))


def num_blocks(start: int, stop: int) -> int:
    """Return how many blocks of a matrix the rows or columns from `start` to `stop` touch."""
    return -(-stop // BLOCK) - start // BLOCK if stop > start else 0


def read_quantization(raw: dict[str, Any]) -> Quantization | None:
    """Return how the weights of the config.json whose content is `raw` are quantised; None where they are not.

    Raises ValueError, in one line that names the method, for one that is not read.
    """
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"config quantization_config = {settings!r}; must be an object")
    method = settings.get("quant_method")
    if method == "mxfp4" and raw.get("model_type") == "gpt_oss":
        return None  # of experts alone, which are widened when they are read
    if method == "fp8":
        return _fp8(settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    if method == "modelopt":
        return _modelopt(settings)
    raise ValueError(f"config quantization_config.quant_method = {method!r}; {FORMATS}")


def _fp8(settings: dict[str, Any]) -> Quantization:
    def known(key: str, *values: Any) -> Any:
        value = settings.get(key) or values[0]
        _require(value in values, key, value, f"valid: {', '.join(str(each) for each in values)}")
        return value

    kept = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    # where a matrix has one scale transformers' files say null; AutoFP8's have no such key
    named = "weight_block_size" in settings
    autofp8 = not named and ("ignored_layers" in settings or settings.get("activation_scheme") == "static")
    by_matrix = autofp8 or (named and settings["weight_block_size"] is None)
    known("weight_block_size", [BLOCK, BLOCK])
    known("activation_scheme", "dynamic", *(("static",) if by_matrix else ()))
    known("fmt", "e4m3", "float8_e4m3fn")
    known("expert_dtype", "fp8")
    more = settings.get("modules_to_convert")
    _require(not more, "modules_to_convert", more, "what is no linear layer is read in 16 and 32 bits only")
    powers_of_two = known("scale_fmt", "float", "ue8m0") == "ue8m0"
    scheme = settings.get("kv_cache_scheme")
    how = Quantization(
        kept=tuple(kept), caches_in_8_bits=bool(scheme and _scheme_of(scheme)), powers_of_two=powers_of_two
    )
    if by_matrix:
        return replace(how, grain="tensor", scale_suffix="weight_scale" if autofp8 else "weight_scale_inv")
    lists = settings.get("modules_to_not_convert") is not None
    return replace(how, head=lists and how.covers("lm_head.weight"))


def _modelopt(settings: dict[str, Any]) -> Quantization:
    """Read what modelopt writes: into config.json, or nested into a file of its own."""
    nested = settings.get("quantization")
    settings = nested if isinstance(nested, dict) else settings
    algorithm = str(settings.get("quant_algo")).upper()
    _require(algorithm in MODELOPT_GRAINS, "quant_algo", settings.get("quant_algo"), FORMATS)
    scheme = settings.get("kv_cache_scheme")
    cache = settings.get("kv_cache_quant_algo") or (_scheme_of(scheme) if scheme else None)
    _require(cache in (None, "FP8"), "kv_cache_quant_algo", cache, "valid: null, FP8")
    patterns = settings.get("exclude_modules") or settings.get("ignore") or ()
    kept = tuple(f"re:{fnmatch.translate(str(pattern))}" for pattern in patterns)
    return Quantization(MODELOPT_GRAINS[algorithm], "weight_scale", kept, exact=True, caches_in_8_bits=cache == "FP8")


def _compressed_tensors(settings: dict[str, Any]) -> Quantization:
    layout, groups = settings.get("format"), list((settings.get("config_groups") or {}).values())
    _require(layout == "float-quantized", "format", layout, f"{REFUSED.get(str(layout), 'such weights')}; {FORMATS}")
    _require(len(groups) == 1, "config_groups", f"{len(groups)} groups", "Helix reads one group")
    weights, targets = groups[0].get("weights") or {}, groups[0].get("targets")
    _require(targets == ["Linear"], "targets", targets, "valid: ['Linear']")
    for key, valid in (("num_bits", (8,)), ("type", ("float",)), ("symmetric", (True, None)), ("strategy", GRAINS)):
        value = weights.get(key)
        _require(value in valid, f"weights.{key}", value, f"valid: {', '.join(str(each) for each in valid)}")
    if weights["strategy"] == "block":
        block = weights.get("block_structure")
        _require(block == [BLOCK, BLOCK], "weights.block_structure", block, f"valid: [{BLOCK}, {BLOCK}]")
    kept = tuple(settings.get("ignore") or ())
    scheme = settings.get("kv_cache_scheme")
    in_8_bits = bool(scheme and _scheme_of(scheme))
    return Quantization(weights["strategy"], "weight_scale", kept, exact=True, caches_in_8_bits=in_8_bits)


def _scheme_of(scheme: Any) -> str:
    """Return what keys and values are cached in, where it is read: "FP8", which AutoFP8 means by "static"."""
    if scheme == "static":
        return "FP8"
    _require(isinstance(scheme, dict), "kv_cache_scheme", scheme, "valid: null, 'static', an object")
    for key, valid in (("num_bits", (8,)), ("type", ("float",)), ("symmetric", (True, None))):
        value = scheme.get(key)
        _require(value in valid, f"kv_cache_scheme.{key}", value, f"valid: {', '.join(str(each) for each in valid)}")
    return "FP8"


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"config quantization_config.{key} = {value!r}; {rule}")
