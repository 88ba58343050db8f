"""Every row format against a decoding written down from its definition, bit for bit."""

import math

import numpy as np
import pytest
import torch

from engram.errors import SelectionError
from engram.nn import dequantize
from engram.rows import ROW_FORMATS, RowFormat

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
OUTPUTS = [torch.float32, torch.bfloat16, torch.float16]
GLOBAL_SCALE = 0.0123456789

NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
0.7229568362236023 1.0"""


def e4m3(code):
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e2m1(code):
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2))


def ue8m0(code):
    return math.nan if code == 255 else 2.0 ** (code - 127)


def float32_of(code):
    return float(np.array(code, np.uint8).view(np.float32)[0])


def decode(values, scales, row_format):
    """Doubles `[rows, dim]`; every product is exact in them."""
    name, out = row_format.name, []
    global_scale = float(np.float32(row_format.global_scale or 1.0))
    for row, own in zip(values.tolist(), scales.tolist(), strict=True):
        if name == "fp8-ue8m0":
            decoded = [e4m3(code) * ue8m0(own[i // 32]) for i, code in enumerate(row)]
        elif name == "fp8":
            decoded = [e4m3(code) * global_scale for code in row]
        elif name == "nvfp4":
            codes = [nibble for byte in row for nibble in (byte & 15, byte >> 4)]
            decoded = [
                e2m1(code) * e4m3(own[i // 16]) * global_scale for i, code in enumerate(codes)
            ]
        else:
            book = [float(np.float32(float(value))) for value in NF4.split()]
            codes = [nibble for byte in row for nibble in (byte >> 4, byte & 15)]
            decoded = [book[code] * float32_of(own) for code in codes]
        out.append(decoded)
    return np.array(out, np.float64)


def rounded(doubles, dtype):
    """Through float32 to the bits of `dtype`, to nearest with ties to even; NaN as it comes."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = doubles.astype(np.float32)
        if dtype == torch.float32:
            return single.view(np.int32)
        if dtype == torch.float16:
            return single.astype(np.float16).view(np.int16)
    bits = single.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.int16)


def check(values, scales, row_format, dtype, device):
    oracle = decode(values, scales, row_format)
    moved = torch.from_numpy(values).to(device)
    own = torch.from_numpy(scales).to(device) if row_format.scale_bytes else None
    found = dequantize(moved, own, row_format, dtype)
    assert found.dtype == dtype
    assert found.device.type == device
    found = found.cpu()
    nan = np.isnan(oracle)
    assert np.array_equal(found.isnan().numpy(), nan)
    bits = found.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
    assert np.array_equal(bits[~nan], rounded(oracle, dtype)[~nan])


def format_of(name, dim):
    return RowFormat(name, dim, GLOBAL_SCALE if name in ("fp8", "nvfp4") else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_fp8_ue8m0_every_code_under_every_scale(dtype, device):
    row_format = format_of("fp8-ue8m0", 256)
    values = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
    scales = np.arange(256, dtype=np.uint8).reshape(32, 8)
    for turn in range(8):
        check(values, np.roll(scales, turn, axis=1), row_format, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_fp8_every_code(dtype, device):
    values = np.arange(256, dtype=np.uint8).reshape(2, 128)
    check(values, np.zeros((2, 0), np.uint8), format_of("fp8", 128), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_nvfp4_every_code_under_every_scale(dtype, device):
    bytes_of_row = np.arange(256, dtype=np.uint8)
    values = np.stack([np.roll(bytes_of_row, 8 * turn) for turn in range(32)])
    scales = np.stack([np.roll(np.arange(32, dtype=np.uint8), turn) for turn in range(32)])
    for eighth in range(8):
        shifted = (scales + 32 * eighth).astype(np.uint8)
        check(values, shifted, format_of("nvfp4", 512), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_nf4_every_code_under_many_scales(dtype, device):
    singles = np.array(
        [1.0, 0.3, -2.5, 1e-38, 1e-45, 3e38, 0.0, -0.0, np.inf, 65504.0, np.pi], np.float32
    )
    values = np.tile(np.arange(256, dtype=np.uint8), (len(singles), 1))
    check(values, singles.view(np.uint8).reshape(-1, 4), format_of("nf4", 512), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_a_format_that_is_the_dtype_keeps_every_bit(name, dtype, device):
    random = np.random.default_rng(1)
    values = random.integers(0, 256, (64, 4 * 64), np.uint8)
    values[0, :8] = [1, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]  # NaN payloads of each width
    row_format = RowFormat(name, values.shape[1] // dtype.itemsize)
    found = dequantize(torch.from_numpy(values).to(device), None, row_format, dtype)
    assert found.dtype == dtype
    assert np.array_equal(found.cpu().view(torch.uint8).numpy(), values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_floats_are_rounded_once(name, dtype, device):
    stored = np.random.default_rng(2).standard_normal((8, 64)) * np.logspace(-9, 9, 8)[:, None]
    if name == "bf16":
        bits = rounded(stored, torch.bfloat16)
        single = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        values = bits
    else:
        with np.errstate(over="ignore"):
            values = stored.astype(np.float32 if name == "fp32" else np.float16)
        single = values.astype(np.float32)
    found = dequantize(
        torch.from_numpy(values.view(np.uint8)).to(device), None, RowFormat(name, 64), dtype
    )
    bits = found.cpu().view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
    assert np.array_equal(bits, rounded(single.astype(np.float64), dtype))


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_any_batch_shape_and_strided_rows(name):
    row_format = format_of(name, 64)
    random = np.random.default_rng(3)
    packed = random.integers(0, 200, (2, 3, 2, row_format.row_bytes), np.uint8)
    width = row_format.value_bytes
    values = torch.from_numpy(packed[..., :width].copy())
    scales = torch.from_numpy(packed[..., width:].copy()) if row_format.scale_bytes else None
    whole = dequantize(values, scales, row_format, torch.float32)
    assert whole.shape == (2, 3, 2, 64)
    layer = dequantize(
        values[:, :, 1], None if scales is None else scales[:, :, 1], row_format, torch.float32
    )
    assert torch.equal(layer.nan_to_num(), whole[:, :, 1].nan_to_num())
    none = dequantize(
        values[:0], None if scales is None else scales[:0], row_format, torch.bfloat16
    )
    assert none.shape == (0, 3, 2, 64)


def test_bytes_of_another_format_are_refused():
    row_format = format_of("fp8-ue8m0", 64)
    values, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    for bad_values, bad_scales, dtype in [
        (values[:, :32], scales, torch.float32),
        (values.to(torch.int8), scales, torch.float32),
        (values, None, torch.float32),
        (values, scales[:, :1], torch.float32),
        (values, scales, torch.int32),
    ]:
        with pytest.raises(SelectionError):
            dequantize(bad_values, bad_scales, row_format, dtype)
    with pytest.raises(SelectionError, match="scales must be None"):
        dequantize(values, scales, RowFormat("fp8", 64, 1.0), torch.float32)
