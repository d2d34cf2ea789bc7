"""Loops, collectives and products of a hand-written module, counted by hand."""

from camopd_jax.planning.hlo import Loop, Module, Traffic, gathered_stacks, whole_logits

TEXT = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (carried: (s32[], bf16[8,16], bf16[7,4,16])) -> (s32[], bf16[8,16], bf16[7,4,16]) {
  %carried = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[7,4,16]{2,1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%carried), index=1
  %weights = bf16[4,16]{1,0} custom-call(%x), custom_call_target="slice"
  %gathered = bf16[16,16]{1,0} all-gather(%weights), channel_id=1, dimensions={0}, metadata={op_name="jit(f)/gather"}
  %product = bf16[8,16]{1,0} convolution(%x, %gathered), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], bf16[8,16], bf16[7,4,16]) tuple(%x, %product, %x)
}

%condition (state: (s32[], bf16[8,16], bf16[7,4,16])) -> pred[] {
  %state = (s32[], bf16[8,16], bf16[7,4,16]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%data_condition (state: (s32[], s32[])) -> pred[] {
  %state = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] get-tuple-element(%state), index=1
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%data_body (state: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %state = (s32[], s32[]) parameter(0)
  %exchange-start = (bf16[2,8], bf16[8,8]) all-gather-start(%state), channel_id=3
  %exchange-done = bf16[8,8] all-gather-done(%exchange-start)
}

ENTRY %main (p: bf16[8,16], stack: bf16[7,4,16]) -> f32[] {
  %p = bf16[8,16]{1,0} parameter(0)
  %stack = bf16[7,4,16]{2,1,0} parameter(1)
  %three = s32[] constant(3)
  %start = (s32[], bf16[8,16], bf16[7,4,16]) tuple(%three, %p, %stack)
  %loop = (s32[], bf16[8,16], bf16[7,4,16]) while(%start), body=%body, condition=%condition, metadata={op_name="f/all"}
  %rows = (s32[], s32[]) while(%start), condition=%data_condition, body=%data_body, metadata={op_name="jit(f)/rows"}
  %one = f32[] constant(1)
  ROOT %total = f32[] all-reduce(%one), channel_id=2, to_apply=%sum
}
"""


def test_a_loop_multiplies_what_is_in_its_body():
    counts = Module(TEXT).counts(trips=lambda loop: 5)
    assert counts.loops == [Loop("f/all", 4, True), Loop("jit(f)/rows", None, False)]  # from 3 up to 7
    assert counts.guessed == ["jit(f)/rows x 5"]
    assert counts.collectives == {
        "all-gather": Traffic(count=2, runs=4 + 5, bytes=512 + 128, bytes_run=4 * 512 + 5 * 128),
        "all-reduce": Traffic(count=1, runs=1, bytes=4, bytes_run=4),
    }
    assert counts.flops == 4 * 2 * 8 * 16 * 16
    assert counts.cycles == 400 and counts.slowest == {"f/all": 400}
    assert counts.busiest["all-gather in jit(f)/gather"] == 2048


def test_an_early_end_makes_the_bound_a_worst_case_and_a_second_loop_goes_on_from_the_first():
    head, tail = TEXT.split("%data_condition (", 1)
    text = head.replace(
        "ROOT %less = pred[] compare(%i, %bound), direction=LT",
        "%less = pred[] compare(%i, %bound), direction=LT\n  ROOT %both = pred[] and(%less, %less)",
    )
    text += "%data_condition (" + tail
    assert Module(text).counts().loops[0] == Loop("f/all", 4, False)
    again = text.replace(
        "%rows = (s32[], s32[]) while(%start), condition=%data_condition, body=%data_body",
        "%left = s32[] get-tuple-element(%loop), index=0\n"
        "  %next = (s32[], bf16[8,16], bf16[7,4,16]) tuple(%left, %p, %stack)\n"
        "  %rows = (s32[], bf16[8,16], bf16[7,4,16]) while(%next), condition=%later, body=%body",
    ).replace("%data_condition (state: (s32[], s32[]))", "%later (state: (s32[], s32[]))")
    again = again.replace("%bound = s32[] get-tuple-element(%state), index=1", "%bound = s32[] constant(17)")
    assert [loop.trips for loop in Module(again).counts().loops] == [4, 10]


def test_two_turns_in_one_are_half_as_many():
    """The TPU compiler writes a product whose shards go around a ring so."""
    counted = "  %i = s32[] get-tuple-element(%carried), index=0\n  %two = s32[] constant(2)\n"
    text = TEXT.replace("tuple(%x, %product, %x)", "tuple(%next, %product, %x)")
    plain = text.replace("  ROOT %out", counted + "  %next = s32[] add(%i, %two)\n  ROOT %out")
    assert Module(plain).counts().loops[0] == Loop("f/all", 2, True), "3 and 5, of those below 7"
    added = """
%added (i: s32[], n: s32[]) -> s32[] {
  %n = s32[] parameter(1)
  %m = s32[] parameter(0)
  ROOT %sum.1 = s32[] add(%m, %n)
}
"""
    fused = "  %next = s32[] fusion(%i, %two), kind=kLoop, calls=%added\n  ROOT %out"
    text = text.replace("\n%body (", added + "\n%body (").replace("  ROOT %out", counted + fused)
    assert Module(text).counts().loops[0].trips == 2


def test_a_comparison_of_arrays_is_no_counter():
    condition = TEXT[TEXT.index("%condition") : TEXT.index("%data_condition")]
    arrays = (
        condition.replace("constant(7)", "constant({7})").replace("s32[] ", "s32[1] ").replace("pred[] c", "pred[1] c")
    )
    assert Module(TEXT.replace(condition, arrays)).counts(trips=lambda loop: 3).loops[0] == Loop("f/all", None, False)


def test_a_collective_that_fusions_take_further_is_one():
    """The TPU compiler starts a collective in one fusion and lets others, here a loop's, carry it on."""
    inside = """
%step (q: bf16[4,16]) -> bf16[16,16] {
  %q = bf16[4,16] parameter(0)
  ROOT %again = bf16[16,16] all-gather(%q), channel_id=9, dimensions={0}
}
"""
    text = TEXT.replace("\n%body (", inside + "\n%body (")
    text = text.replace(
        "  %product = ", "  %fusion.1 = bf16[16,16] fusion(%weights), kind=kCustom, calls=%step\n  %product = "
    )
    counts = Module(text).counts().collectives["all-gather"]
    assert counts.runs == 4 + 4 + 1, "an ordinary fusion's own collective"
    started = "  %async-collective-start = bf16[16,16] fusion(%p), kind=kCustom, calls=%step\n  %three ="
    text = text.replace("  %three =", started)
    assert Module(text).counts().collectives["all-gather"].runs == 4 + 1 + 1


def test_an_all_reduce_whose_fusion_keeps_a_part_is_a_reduce_scatter():
    inside = """
%all-reduce-scatter.1 (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16] parameter(0)
  %summed = bf16[8,16] all-reduce(%input), channel_id=9, to_apply=%sum
  ROOT %part = bf16[2,16] dynamic-slice(%summed), dynamic_slice_sizes={2,16}
}
"""
    text = TEXT.replace("\n%body (", inside + "\n%body (").replace(
        "  %product = ",
        "  %scattered = bf16[2,16] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n  %product = ",
    )
    assert Module(text).counts().collectives["reduce-scatter"] == Traffic(count=1, runs=4, bytes=256, bytes_run=1024)
    assert Module(text).counts().collectives["all-reduce"].runs == 1, "the one outside"


def test_cycles_that_the_compiler_does_not_know_are_left_out():
    assert Module(TEXT.replace('"100"', '"9223372036854775807"')).counts().cycles == 0


def test_products_written_as_convolutions():
    """A batch of 16 x 4 products, as the TPU compiler writes it: dilated, so that no output meets another's input."""
    text = """ENTRY %main (q: bf16[16,4,5,128], k: bf16[16,4,36,128]) -> f32[16,4,5,36] {
  %q = bf16[16,4,5,128] parameter(0)
  %k = bf16[16,4,36,128] parameter(1)
  ROOT %scores = f32[16,4,5,36] convolution(%q, %k), window={size=16x4 stride=15x3 lhs_dilate=16x4}, dim_labels=01bf_01oi->01bf
}
"""  # noqa: E501
    assert Module(text).counts().flops == 2 * 16 * 4 * 5 * 36 * 128
    heads = """ENTRY %main (x: bf16[7,1,3,64], w: bf16[1,64,8,32]) -> bf16[7,8,3,32] {
  %x = bf16[7,1,3,64] parameter(0)
  %w = bf16[1,64,8,32] parameter(1)
  ROOT %y = bf16[7,8,3,32] convolution(%x, %w), window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=01bf_0i1o->01bf
}
"""  # noqa: E501
    assert Module(heads).counts().flops == 2 * 3 * 7 * 8 * 32 * 64


def test_fused_attention_is_counted_by_its_pairs():
    """As the TPU compiler writes a kernel: over several lines. 2 rows of 3 heads, 21 pairs of width 64."""
    text = """ENTRY %main (q: bf16[2,3,6,64], k: bf16[2,1,6,64]) -> f32[] {
  %q = bf16[2,3,6,64] parameter(0)
  %k = bf16[2,1,6,64] parameter(1)
  %splash.2 = (f32[6,128], bf16[2,3,6,64]) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/attention_of_21_pairs_64_wide/vmap(s)/splash_mha_fwd_residuals/pallas_call"}, backend_config={}
  %splash.3 = (bf16[2,1,6,64], bf16[2,1,6,64]) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(attention_of_21_pairs_64_wide)/splash_mha_dkv_no_residuals/pallas_call"}
  %other = f32[2,3,6,64] custom-call(%q), custom_call_target="GatherScatterIndicesBitpacked"
  ROOT %one = f32[] constant(1)
}
"""  # noqa: E501
    assert Module(text).counts().flops == (2 + 4) * 2 * 21 * 64 * 2 * 3


def test_what_must_not_be_is_found_where_it_is():
    module = Module(TEXT)
    assert gathered_stacks(module, layers=7) == []
    assert whole_logits(module, tokens=24, vocab=(101,)) == []
    bad = TEXT.replace(
        "  %one = f32[]",
        "  %all = bf16[7,16,16] all-gather(%stack), channel_id=4, dimensions={1}\n"
        "  %logits = f32[3,8,101] custom-call(%p), custom_call_target=\"head\"\n  %one = f32[]",
    )  # fmt: skip
    assert [i.name for i in gathered_stacks(Module(bad), layers=7)] == ["all"]
    assert [i.name for i in whole_logits(Module(bad), tokens=24, vocab=(101,))] == ["logits"]
    assert whole_logits(Module(bad), tokens=25, vocab=(101,)) == [], "a chunk of fewer tokens is as it should be"
