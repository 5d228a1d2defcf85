"""The control branch: what it is before it has learnt, where its hints go, and that nothing of the base changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lamella.errors import CheckpointError, MethodError
from lamella.files import Work
from lamella.methods.refacade import Base, ControlBranch, Retexturer, TextureRemover, hint_sensitivity, most_sensitive
from lamella.methods.refacade.modules import STREAMS, ControlBlock, apply_rotary
from lamella.train.recompute import recomputing

from .pipelines import branch, branch_inputs, halved, latents, pixels


def answer(base: Base, made: ControlBranch | None, scale: float = 1.0, **given: Tensor) -> Tensor:
    if made is None:
        return base.velocity(given["z"], given["t"], given["reference"])
    with made.attached(base.network, given["c"], given["c_r"], scale):
        return base.velocity(given["z"], given["t"], given["reference"])


@pytest.mark.parametrize("base", [pixels, latents])
def test_before_it_has_learnt_it_changes_nothing_and_its_last_maps_learn_first(base: object) -> None:
    opened: Base = base()  # type: ignore[operator]
    given, fresh = branch_inputs(opened), branch(opened, silent=True)
    torch.testing.assert_close(answer(opened, fresh, **given), answer(opened, None, **given), atol=1e-6, rtol=0)
    answer(opened, fresh, **given).square().mean().backward()
    grads = {
        name: 0.0 if each.grad is None else float(each.grad.abs().max()) for name, each in fresh.named_parameters()
    }
    assert all(grads[f"blocks.{number}.after.weight"] > 0 for number in range(len(fresh.layers)))
    assert all(each.grad is None for each in opened.network.parameters())


def test_beside_a_base_of_bfloat16_it_is_of_float32() -> None:
    base = halved()
    assert base.network.proj_out.weight.dtype == torch.bfloat16
    given, fresh, learnt = branch_inputs(base), branch(base, silent=True), branch(base)
    assert {each.dtype for each in fresh.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(answer(base, fresh, **given), answer(base, None, **given))
        ours = answer(base, learnt, **given)
        whole = Base(copy.deepcopy(base.network).float(), base.vae, "the same in float32")
        theirs = answer(whole, learnt, **given)
        apart = float((answer(whole, None, **given) - theirs).abs().max())
    assert float((ours - theirs).abs().max()) < 0.1 * apart  # it does the same, as far as the base's numbers go


def test_in_bfloat16_beside_such_a_base_it_does_nearly_the_same() -> None:
    base = halved()
    given, learnt = branch_inputs(base), branch(base)
    cast, fresh = copy.deepcopy(learnt).bfloat16(), branch(base, silent=True).bfloat16()
    kinds = set()
    for module in cast.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, out: kinds.add(out.dtype))
    with torch.no_grad():
        assert torch.equal(answer(base, fresh, **given), answer(base, None, **given))
        ours, theirs = answer(base, cast, **given), answer(base, learnt, **given)
        apart = float((answer(base, None, **given) - theirs).abs().max())
    assert kinds == {torch.bfloat16} and float((ours - theirs).abs().max()) < 0.1 * apart
    torch.manual_seed(0)
    made = Retexturer.of(base, learnt, TextureRemover.fresh(base))
    assert {each.dtype for each in made.branch(base).parameters()} == {torch.bfloat16}
    assert {each.dtype for each in made.weights.values()} == {torch.float32}


@pytest.mark.parametrize("base", [pixels, latents])
def test_recomputed_activations_give_the_same_gradients_and_need_less_memory(base: object) -> None:
    opened: Base = base()  # type: ignore[operator]
    given, grads, kept = branch_inputs(opened), [], []
    for enabled in (False, True):
        made, stored = branch(opened, 0, 1, 2), 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal stored
            stored += tensor.numel()
            return tensor

        with (
            recomputing(torch.nn.ModuleList([opened.network, made]), enabled),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            loss = answer(opened, made, **given).square().mean()
            kept.append(stored)
            loss.backward()
        grads.append({name: each.grad for name, each in made.named_parameters()})
    for name, each in grads[0].items():
        torch.testing.assert_close(grads[1][name], each, atol=1e-6, rtol=1e-4)
    assert kept[1] < 0.5 * kept[0]
    assert not any("forward" in each.__dict__ for each in opened.network.modules())


def test_at_scale_nothing_the_base_is_alone_at_any_stage_of_training() -> None:
    base, given = pixels(), branch_inputs(pixels())
    learnt = branch(base)
    assert not torch.allclose(answer(base, learnt, **given), answer(base, None, **given), atol=1e-3)
    assert torch.equal(answer(base, learnt, 0.0, **given), answer(base, None, **given))


def test_removed_it_leaves_the_base_bitwise() -> None:
    base, given = pixels(), branch_inputs(pixels())
    before = {name: each.clone() for name, each in base.network.state_dict().items()}
    answered = answer(base, None, **given)
    with pytest.raises(RuntimeError), branch(base).attached(base.network, given["c"], given["c_r"]):
        raise RuntimeError  # whatever happens inside
    answer(base, branch(base), **given).sum().backward()
    assert all(torch.equal(each, before[name]) for name, each in base.network.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in base.network.modules())
    assert torch.equal(answer(base, None, **given), answered)


def by_hand(base: Base, made: ControlBranch, scale: float, given: dict[str, Tensor]) -> Tensor:
    """The pseudocode of a step, block by block, without hooks; a block is compared with Wan's own below."""
    network = base.network
    frames = torch.cat([given["reference"], given["z"]], dim=2)
    rotary = network.rope(frames)
    h = network.patch_embedding(frames).flatten(2).transpose(1, 2)
    text = base.text().expand(len(frames), -1, -1)
    time, six, words, _ = network.condition_embedder(1000 * given["t"], text)
    six = six.unflatten(1, (6, -1))
    a = made.patches["video"](given["c"]).flatten(2).transpose(1, 2)
    r = made.patches["reference"](given["c_r"]).flatten(2).transpose(1, 2)
    size = r.shape[1]
    sinusoids = network.condition_embedder.timesteps_proj(1000 * given["t"])
    times = []
    for stream in ("video", "reference"):
        parts = made.times[stream]
        times.append(parts["projection"](F.silu(parts["embedder"](sinusoids))).unflatten(1, (6, -1)))
    hints = {}
    for number, (layer, block) in enumerate(zip(made.layers, made.blocks, strict=True)):
        if number == 0:
            a, r = block.joining["video"](a) + h[:, size:], block.joining["reference"](r) + h[:, :size]
        a, r = block(a, r, words, tuple(times), rotary)
        hints[layer] = block.after(torch.cat([r, a], dim=1))
    for layer, main in enumerate(network.blocks):
        h = main(h, words, six, rotary)
        if layer in hints:
            h = h + scale * hints[layer]
    shift, factor = (network.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
    h = network.proj_out(network.norm_out(h) * (1 + factor) + shift)
    p_t, p_h, p_w = network.config.patch_size
    grid = (frames.shape[2] // p_t, frames.shape[3] // p_h, frames.shape[4] // p_w)
    h = h.unflatten(1, grid).unflatten(-1, (p_t, p_h, p_w, -1))  # [batch, t, y, x, p_t, p_h, p_w, C]
    h = h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return h[:, :, 1:]


@pytest.mark.parametrize("base", [pixels, latents])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_it_is_the_papers_step(base: object, scale: float) -> None:
    opened: Base = base()  # type: ignore[operator]
    given, made = branch_inputs(opened), branch(opened, 0, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            answer(opened, made, scale, **given), by_hand(opened, made, scale, given), atol=1e-5, rtol=1e-5
        )


def alone(monkeypatch: pytest.MonkeyPatch, seen: slice, size: int) -> None:
    """Let whatever attends to itself over so many tokens see some of them alone."""
    whole, keys = F.scaled_dot_product_attention, torch.zeros(size, size, dtype=torch.bool)
    keys[:, seen] = True

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: object) -> Tensor:
        mask = keys if query.shape[2] == key.shape[2] == size else attn_mask
        return whole(query, key, value, attn_mask=mask, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)


def of_stream(base: Base, block: ControlBlock, stream: str) -> Any:
    """Wan's own block with the weights of a stream."""
    plain = copy.deepcopy(base.network.blocks[0])
    for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
        getattr(plain.attn1, name).load_state_dict(getattr(block.attention, stream)[name].state_dict())
    plain.attn1.to_out.load_state_dict(block.attention.to_out.state_dict())
    plain.attn2.load_state_dict(block.cross.state_dict())
    plain.norm2.load_state_dict(block.norm_text.state_dict())
    plain.ffn.load_state_dict(block.feed_forward[stream].state_dict())
    plain.scale_shift_table.data.copy_(block.tables[stream])
    return plain


@pytest.mark.parametrize(("stream", "tokens"), [("video", slice(4, 12)), ("reference", slice(0, 4))])
def test_a_stream_that_does_not_see_the_other_is_wans_own_block(
    stream: str, tokens: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pixels()
    block: Any = branch(base, 0).blocks[0]
    plain = of_stream(base, block, stream)
    if stream == "reference":  # which reads no text
        for each in plain.attn2.to_out.parameters():
            each.data.zero_()
    torch.manual_seed(0)
    a, r, text = torch.randn(2, 8, 48), torch.randn(2, 4, 48), torch.randn(2, 1, 48)
    times = (torch.randn(2, 6, 48), torch.randn(2, 6, 48))
    rotary = base.network.rope(torch.zeros(1, 3, 3, 8, 8))  # three frames of 2 x 2 tokens, the reference first
    which = STREAMS.index(stream)
    with torch.no_grad():
        theirs = plain((a, r)[which], text, times[which], tuple(each[:, tokens] for each in rotary))
        assert not torch.allclose(block(a, r, text, times, rotary)[which], theirs, atol=1e-3)
        alone(monkeypatch, tokens, 12)
        ours = block(a, r, text, times, rotary)[which]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_reference_tokens_in_another_order_with_their_positions_are_the_same() -> None:
    base = pixels()
    block = branch(base, 0).blocks[0]
    torch.manual_seed(0)
    a, r, text = torch.randn(2, 8, 48), torch.randn(2, 4, 48), torch.randn(2, 1, 48)
    times = (torch.randn(2, 6, 48), torch.randn(2, 6, 48))
    cos, sin = base.network.rope(torch.zeros(1, 3, 3, 8, 8))
    order = torch.tensor([2, 0, 3, 1])
    everywhere = torch.cat([order, torch.arange(4, 12)])
    with torch.no_grad():
        one_a, one_r = block(a, r, text, times, (cos, sin))
        other_a, other_r = block(a, r[:, order], text, times, (cos[:, everywhere], sin[:, everywhere]))
        moved, _ = block(a, r[:, order], text, times, (cos, sin))
    torch.testing.assert_close(one_a, other_a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one_r[:, order], other_r, atol=1e-5, rtol=1e-5)
    assert float((one_a - moved).abs().max()) > 1e-4  # where a token is matters


def test_rotary_positions_are_turns_of_pairs() -> None:
    base = pixels()
    cos, sin = base.network.rope(torch.zeros(1, 3, 2, 8, 8))
    x = torch.randn(1, 8, 2, 24)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turn = torch.complex(cos[..., 0::2].double(), sin[..., 0::2].double())
    expected = torch.view_as_real(pairs * turn).flatten(-2)
    torch.testing.assert_close(apply_rotary(x, cos, sin).double(), expected, atol=1e-6, rtol=1e-6)


def test_text_reaches_the_video_stream_alone() -> None:
    base = pixels()
    block = branch(base, 0).blocks[0]
    torch.manual_seed(0)
    a, r = torch.randn(1, 8, 48), torch.randn(1, 4, 48)
    times, rotary = (torch.randn(1, 6, 48),) * 2, base.network.rope(torch.zeros(1, 3, 3, 8, 8))
    with torch.no_grad():
        (a1, r1), (a2, r2) = (block(a, r, torch.randn(1, 1, 48), times, rotary) for _ in range(2))
    assert torch.equal(r1, r2) and not torch.equal(a1, a2)


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 9]])
def test_layers_that_there_are_not_are_refused(layers: list[int]) -> None:
    with pytest.raises(MethodError, match="give layers from 0 to 2"):
        ControlBranch(pixels().network, layers, *pixels().control_channels)


# The adapter file


def written(tmp_path: Path) -> tuple[Path, Retexturer]:
    base = pixels()
    made = Retexturer.of(base, branch(base), TextureRemover.fresh(base))
    out = tmp_path / "out"
    out.mkdir()
    made.write(out)
    return out, made


def test_the_adapter_alone_is_read_back_and_says_its_base(tmp_path: Path) -> None:
    base = pixels()
    out, made = written(tmp_path)
    again = Retexturer.read(out)
    assert again.adapter == made.adapter and again.adapter.base == base.digest
    assert again.adapter.layers == (0, 2)
    expected = branch(base).state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in again.branch(base).state_dict().items())
    names = set(load_file(out / "control.safetensors"))
    assert not names & set(base.network.state_dict())  # nothing of the base travels


def test_another_base_is_refused_in_one_line(tmp_path: Path) -> None:
    out, _ = written(tmp_path)
    network = copy.deepcopy(pixels().network)
    network.proj_out.bias.data[0] += 1e-3
    with pytest.raises(MethodError, match="the branch belongs to a base 'pixels'") as error:
        Retexturer.read(out).branch(Base(network, None, "another"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "[]"}, "no adapter"),
        ({"layers": "[0, 1, 2]"}, "lacks tensors of the network: blocks.2"),
        ({"layers": "[0, 99]"}, "give layers from 0 to 2"),
        ({"channels": "[7, 9]"}, "channels"),
        ({"hidden": "65536"}, "is not the width of its weights"),
        ({"schema": '"other/1"'}, "no adapter"),
    ],
)
def test_a_damaged_adapter_is_refused(change: dict[str, str], message: str, tmp_path: Path) -> None:
    import json

    out, made = written(tmp_path)
    document = json.loads(made.adapter.model_dump_json(by_alias=True))
    document |= {name: json.loads(value) for name, value in change.items()}
    save_file(made.weights, out / "control.safetensors", metadata={"refacade": json.dumps(document)})
    with pytest.raises((CheckpointError, MethodError), match=message) as error:
        Retexturer.read(out).branch(pixels())
    assert "\n" not in str(error.value)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    out, _ = written(tmp_path)
    (out / "control.safetensors").write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(CheckpointError, match="no adapter"):
        Retexturer.read(out)
    with pytest.raises(CheckpointError, match="no adapter"):
        Retexturer.read(tmp_path / "nothing")


# Sensitivity


def test_what_a_push_changes_is_measured_layer_by_layer(tmp_path: Path) -> None:
    base = pixels()
    torch.manual_seed(0)
    clean = torch.randn(3, 3, 1, 8, 8)
    found = hint_sensitivity(base, clean, draws=2, seed=0, work=Work(tmp_path))
    assert len(found["output"]) == len(found["loss"]) == base.depth and min(found["output"]) > 0
    assert hint_sensitivity(base, clean, draws=2, seed=0, work=Work()) == found
    deaf = Base(copy.deepcopy(base.network), None, "deaf")
    last = deaf.network.blocks[-1]
    last.register_forward_hook(lambda module, given, out: torch.ones_like(out))  # what comes before it is lost
    lost = hint_sensitivity(deaf, clean, draws=1, seed=0, work=Work())
    assert lost["output"][0] == lost["output"][1] == 0.0 and lost["output"][2] > 0


def test_clips_are_pushed_one_by_one_and_a_stopped_run_resumes(tmp_path: Path) -> None:
    base, rows = pixels(), []
    torch.manual_seed(0)
    clean = torch.randn(3, 3, 1, 8, 8)
    whole = hint_sensitivity(base, clean, draws=2, seed=0, work=Work(tmp_path))
    journal = tmp_path / "layers.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # as if it had been stopped before the last clip
    hook = base.network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    try:
        again = hint_sensitivity(base, clean, draws=2, seed=0, work=Work(tmp_path))
    finally:
        hook.remove()
    assert again == whole and rows == [1] * 2 * (1 + base.depth)  # the unpushed velocity once for each draw


def test_the_most_sensitive_layers_come_in_their_order() -> None:
    assert most_sensitive([0.1, 5.0, 0.3, 2.0], 2) == [1, 3]
    assert most_sensitive([3.0, 1.0, 3.0], 2) == [0, 2]
