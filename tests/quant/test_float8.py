"""FP8 decoded by moving bits, against torch's own conversion."""

import torch

from npuq.quant.float8 import decode_e4m3


def test_every_code_is_decoded_as_by_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 64)
    ours, theirs = decode_e4m3(codes), codes.to(torch.float32)
    assert int(theirs.isnan().sum()) == 2
    assert torch.equal(ours.isnan(), theirs.isnan())
    bits = [values.nan_to_num(0.0).view(torch.int32) for values in (ours, theirs)]  # −0 is not 0
    assert torch.equal(*bits)


def test_strided_and_empty_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)[:, ::2]
    assert torch.equal(decode_e4m3(codes).nan_to_num(7.0), codes.to(torch.float32).nan_to_num(7.0))
    assert decode_e4m3(codes[:0]).shape == (0, 8)
