"""Loops and collectives of a hand-written module, counted by hand."""

from unwanted import gathered_stacks, whole_logits

from camopd_jax.planning.hlo import Module, Traffic

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


def gathers(text, trips=1):
    return Module(text).collectives(trips)["all-gather"]


def test_a_loop_multiplies_what_is_in_its_body():
    assert Module(TEXT).collectives(trips=5) == {
        "all-gather": Traffic(count=2, runs=7 + 5, bytes=512 + 128, bytes_run=7 * 512 + 5 * 128),
        "all-reduce": Traffic(count=1, runs=1, bytes=4, bytes_run=4),
    }


def test_an_early_end_makes_the_bound_a_worst_case():
    text = TEXT.replace(
        "ROOT %less = pred[] compare(%i, %bound), direction=LT",
        "%less = pred[] compare(%i, %bound), direction=LT\n  ROOT %both = pred[] and(%less, %less)",
    )
    assert gathers(text).runs == 7 + 1


def test_two_turns_in_one_are_half_as_many():
    """The TPU compiler writes a product whose shards go around a ring so."""
    counted = "  %i = s32[] get-tuple-element(%carried), index=0\n  %two = s32[] constant(2)\n"
    text = TEXT.replace("tuple(%x, %product, %x)", "tuple(%next, %product, %x)")
    plain = text.replace("  ROOT %out", counted + "  %next = s32[] add(%i, %two)\n  ROOT %out")
    assert gathers(plain).runs == 4 + 1, "at 0, 2, 4 and 6"
    added = """
%added (i: s32[], n: s32[]) -> s32[] {
  %n = s32[] parameter(1)
  %m = s32[] parameter(0)
  ROOT %sum.1 = s32[] add(%m, %n)
}
"""
    fused = "  %next = s32[] fusion(%i, %two), kind=kLoop, calls=%added\n  ROOT %out"
    text = text.replace("\n%body (", added + "\n%body (").replace("  ROOT %out", counted + fused)
    assert gathers(text).runs == 4 + 1


def test_a_comparison_of_arrays_is_no_counter():
    condition = TEXT[TEXT.index("%condition") : TEXT.index("%data_condition")]
    arrays = (
        condition.replace("constant(7)", "constant({7})").replace("s32[] ", "s32[1] ").replace("pred[] c", "pred[1] c")
    )
    assert gathers(TEXT.replace(condition, arrays), trips=3).runs == 3 + 3


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
    assert gathers(text).runs == 7 + 7 + 1, "an ordinary fusion's own collective"
    started = "  %async-collective-start = bf16[16,16] fusion(%p), kind=kCustom, calls=%step\n  %three ="
    text = text.replace("  %three =", started)
    assert gathers(text).runs == 7 + 1 + 1


def test_a_collective_in_an_asynchronous_call_counts_where_the_call_starts():
    inside = """
%wrapped (q: bf16[4,16]) -> bf16[16,16] {
  %q = bf16[4,16] parameter(0)
  ROOT %again = bf16[16,16] all-gather(%q), channel_id=9, dimensions={0}
}
"""
    begun = "  %begun = ((bf16[4,16]), bf16[16,16]) async-start(%weights), calls=%wrapped\n"
    ended = "  %ended = bf16[16,16] async-done(%begun), calls=%wrapped\n"
    text = TEXT.replace("\n%body (", inside + "\n%body (").replace("  %product = ", begun + ended + "  %product = ")
    assert gathers(text) == Traffic(count=3, runs=7 + 7 + 1, bytes=2 * 512 + 128, bytes_run=14 * 512 + 128)


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
    total = Module(text).collectives()
    assert total["reduce-scatter"] == Traffic(count=1, runs=7, bytes=256, bytes_run=7 * 256)
    assert total["all-reduce"].runs == 1, "the one outside"


def test_metadata_on_lines_of_its_own_is_passed_over():
    """As the TPU compiler writes a Pallas kernel."""
    text = TEXT.replace(
        "  %one = f32[]",
        """  %kernel = (f32[6,128], bf16[2,3,6,64]) custom-call(%p), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/splash"}, backend_config={}
  %one = f32[]""",
    )
    assert Module(text).collectives() == Module(TEXT).collectives()
    assert ("bf16", (2, 3, 6, 64)) in [array for i in Module(text).instructions() for array in i.arrays]


def test_without_a_text_there_is_nothing():
    assert Module("").collectives() == {} and list(Module("").instructions()) == []


def test_what_must_not_be_is_found_where_it_is():
    module = Module(TEXT)
    assert gathered_stacks(module, layers=7) == whole_logits(module, tokens=24, vocab=(101,)) == set()
    bad = TEXT.replace(
        "  %one = f32[]",
        "  %all = bf16[7,16,16] all-gather(%stack), channel_id=4, dimensions={1}\n"
        "  %logits = f32[3,8,101] custom-call(%p), custom_call_target=\"head\"\n  %one = f32[]",
    )  # fmt: skip
    assert gathered_stacks(Module(bad), layers=7) == {"bf16[7,16,16]"}
    assert whole_logits(Module(bad), tokens=24, vocab=(101,)) == {"f32[3,8,101]"}
    assert whole_logits(Module(bad), tokens=25, vocab=(101,)) == set(), "a chunk of fewer tokens is as it should be"
