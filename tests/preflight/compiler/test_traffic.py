"""Main-memory traffic and products, counted in the text of a compiled program."""

# ruff: noqa: E501  (lines as the compiler writes them)

import pytest

from preflight.compiler import traffic

# As the compiler writes a program for v5e: the weights (4 MiB) are copied to VMEM, S(1), ahead of
# their use by a fusion that multiplies and a fusion that updates.
PROGRAM = """\
HloModule step, is_scheduled=true

%fused_product (p0: bf16[128,1024], p1: bf16[1024,1024]) -> f32[128,1024] {
  %p0 = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot = f32[128,1024]{1,0:T(8,128)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%fused_rows (p0: f32[30522,256], p1: s32[], p2: f32[5,256]) -> (f32[], f32[30522,256]) {
  %p0.1 = f32[30522,256]{1,0:T(8,128)} parameter(0)
  %p1.1 = s32[]{:T(128)S(6)} parameter(1)
  %p2.1 = f32[5,256]{1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %rows = f32[8,256]{1,0:T(8,128)} dynamic-slice(%p0.1, %p1.1, %zero), dynamic_slice_sizes={8,256}
  %sum = f32[]{:T(128)} reduce(%rows, %zero), dimensions={0,1}, to_apply=%add
  %new = f32[30522,256]{1,0:T(8,128)} dynamic-update-slice(%p0.1, %p2.1, %p1.1, %zero)
  ROOT %both = (f32[]{:T(128)}, f32[30522,256]{1,0:T(8,128)}) tuple(%sum, %new)
}

ENTRY %main (a: bf16[128,1024], w: bf16[1024,1024], t: f32[30522,256], i: s32[], r: f32[5,256]) -> (f32[], f32[30522,256], f32[128,1024]) {
  %a = bf16[128,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %t = f32[30522,256]{1,0:T(8,128)} parameter(2)
  %i = s32[]{:T(128)S(6)} parameter(3)
  %r = f32[5,256]{1,0:T(8,128)} parameter(4)
  %copy-start = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[30522,256]{1,0:T(8,128)}), f32[64,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%t), slice={[0:64], [0:256]}
  %slice-done = f32[64,256]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %joined = f32[64,256]{1,0:T(8,128)S(1)} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %product = f32[128,1024]{1,0:T(8,128)S(1)} fusion(%a, %copy-done), kind=kOutput, calls=%fused_product
  %again = f32[128,1024]{1,0:T(8,128)} fusion(%a, %copy-done), kind=kOutput, calls=%fused_product
  %updated = (f32[]{:T(128)}, f32[30522,256]{1,0:T(8,128)}) fusion(%t, %i, %r), kind=kLoop, calls=%fused_rows
  %x = f32[]{:T(128)} get-tuple-element(%updated), index=0
  %y = f32[30522,256]{1,0:T(8,128)} get-tuple-element(%updated), index=1
  ROOT %out = (f32[]{:T(128)}, f32[30522,256]{1,0:T(8,128)}, f32[128,1024]{1,0:T(8,128)}) tuple(%x, %y, %again)
}
"""


def test_only_main_memory_counts():
    counted = traffic.count_traffic(PROGRAM)
    weights, slice_bytes = 2 * 1024**2, 4 * 64 * 256
    assert counted.copied_bytes == weights + slice_bytes  # read once, for both products
    activations, results = 2 * 128 * 1024, 4 * 128 * 1024
    flops = 2 * 128 * 1024 * 1024
    assert counted.products == ((flops, activations, 1), (flops, activations + results, 1))
    # 8 rows are read and 5 written, in tiles of 8; the table itself stays in place.
    rows = 4 * 8 * 256
    scalar = 4 * 128
    updated = rows + rows + rows + scalar
    assert counted.main_bytes == counted.copied_bytes + 2 * activations + results + updated


def test_all_memories_count_if_they_are_asked_for():
    weights, slice_bytes = 2 * 1024**2, 4 * 64 * 256
    activations, results = 2 * 128 * 1024, 4 * 128 * 1024
    # Copies are read and written; each product reads the copy and writes its result. The padded
    # index and two scalars count, too.
    copied = 2 * (weights + slice_bytes)
    products = 2 * (weights + activations + results)
    updated = 3 * 4 * 8 * 256 + 2 * 4 * 128
    assert traffic.count_all_bytes(PROGRAM) == copied + products + updated


LOOP = """\
HloModule loop, is_scheduled=true

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %twice = f32[8,128]{1,0:T(8,128)} add(%x, %x)
  ROOT %next = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %twice)
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %more = pred[]{:T(512)S(6)} constant(true)
}

ENTRY %main (start: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %start = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %end = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
}
"""


def test_the_body_of_a_loop_counts_once():
    counted = traffic.count_traffic(LOOP)
    assert counted == traffic.Traffic(3 * 4 * 8 * 128, 0, ())


def test_arrays_are_padded_to_tiles_in_the_order_of_their_layout():
    assert traffic.main_memory_bytes("f32[3,100]{1,0:T(8,128)}") == 4 * 8 * 128
    assert traffic.main_memory_bytes("f32[3,100]{0,1:T(8,128)}") == 4 * 104 * 128
    assert traffic.main_memory_bytes("bf16[10,1,9]{2,0,1:T(8,128)(2,1)}") == 2 * 16 * 128
    assert traffic.main_memory_bytes("(f32[2]{0:T(256)}, s32[]{:T(128)S(6)}, pred[4])") == 1024 + 4
    assert traffic.main_memory_bytes("f32[8,128]{1,0:T(8,128)S(3)}") == 0


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # ResNet's first layer: 112 x 112 results, 7 x 7 x 3 products each, fewer at the edges.
        (
            "bf16[8,224,224,3]",
            "bf16[7,7,3,64]",
            "bf16[8,112,112,64]",
            "window={size=7x7 stride=2x2 pad=3_3x3_3}, dim_labels=b01f_01io->b01f",
            2 * 8 * 64 * 3 * (112 * 7 - 3 - 1 - 2) ** 2,
        ),
        # The gradient of a 1 x 1 convolution with stride 2: three of four positions are holes.
        (
            "bf16[8,28,28,512]",
            "bf16[1,1,256,512]",
            "bf16[8,56,56,256]",
            "window={size=1x1 pad=0_1x0_1 lhs_dilate=2x2}, dim_labels=b01f_01oi->b01f",
            2 * 8 * 28 * 28 * 512 * 256,
        ),
        # A projection to 4 heads, [8, 128, 256] x [256, 4, 64], as the compiler writes it: of 4 x 4
        # pairs of heads, 4 are in the window.
        (
            "bf16[8,128,256,1]",
            "bf16[256,4,64,1]",
            "bf16[8,128,4,64]",
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            2 * 8 * 128 * 256 * 4 * 64,
        ),
    ],
)
def test_flops_of_convolutions(left, right, result, attributes, flops):
    assert traffic._convolution_flops(left, right, result, attributes) == flops
