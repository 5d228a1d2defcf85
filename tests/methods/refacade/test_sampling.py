"""Drawing: conditions, guidance, one generator for all noise, and the whole pipeline on the real classes."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch

from lamella.errors import MethodError
from lamella.methods.refacade import (
    Base,
    Conditions,
    Jigsaw,
    SamplerSettings,
    TextureRemover,
    conditions,
    dilate_mask,
    euler,
    fold_mask,
    guided_velocity,
    mask_latent,
    retexture,
    sample_latents,
    textured_object,
    unfold_mask,
)
from lamella.methods.refacade.flow import add_noise

from .pipelines import branch, branch_inputs, folder, halved, latents, pixels


def test_folding_a_mask_is_undone_and_has_64_channels() -> None:
    mask = (torch.rand(5, 1, 48, 32) > 0.5).float()
    assert fold_mask(mask, 8).shape == (5, 64, 6, 4)
    assert torch.equal(unfold_mask(fold_mask(mask, 8), 8), mask)
    assert torch.equal(fold_mask(mask, 8)[:, :, 2, 1].view(5, 8, 8), mask[:, 0, 16:24, 8:16])  # one block, row by row
    found = mask_latent(mask, 8, 2)
    assert found.shape == (64, 2, 6, 4)
    assert torch.equal(found[:, 0], fold_mask(mask[1:2], 8)[0]) and torch.equal(found[:, 1], fold_mask(mask[3:4], 8)[0])


def test_a_dilated_mask_is_what_a_box_reaches() -> None:
    mask = (torch.rand(2, 1, 20, 17) > 0.97).float()
    for radius in (0, 1, 3):
        found = dilate_mask(mask, radius)
        for frame in range(2):
            for y in range(20):
                for x in range(17):
                    box = mask[frame, 0, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
                    assert bool(found[frame, 0, y, x]) == bool(box.any())


def test_clean_data_are_where_the_velocity_leads_back() -> None:
    z_0 = torch.randn(6, 3, 2, 4, 4)
    z_t, t, v = add_noise(z_0)
    torch.testing.assert_close(z_t - t.view(-1, 1, 1, 1, 1) * v, z_0, atol=1e-6, rtol=1e-5)
    assert float(t.min()) >= 0 and float(t.max()) < 1 and len(set(t.tolist())) == 6


def test_eulers_steps_are_those_of_diffusers() -> None:
    def velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * z) + t.view(-1, 1)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    noise = torch.randn(4, 5)
    z = noise
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        z = scheduler.step(velocity(z, sigma.expand(4)), timestep, z).prev_sample
    torch.testing.assert_close(euler(velocity, noise, 3), z, atol=1e-6, rtol=1e-5)


def test_a_straight_path_needs_one_step() -> None:
    z_0, eps = torch.randn(2, 4), torch.randn(2, 4)
    for steps in (1, 3, 7):
        torch.testing.assert_close(euler(lambda z, t: eps - z_0, eps, steps), z_0, atol=1e-5, rtol=1e-5)


def all_told(base: Base) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    given = branch_inputs(base)
    return given["z"], given["t"], Conditions(given["reference"], given["c"], given["c_r"])


class Counted:
    """Counts passes of a network."""

    def __init__(self, base: Base) -> None:
        self.count = 0
        self.hook = base.network.register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("opened", [pixels, latents])
def test_guidance_of_one_is_the_conditional_pass_alone(opened: object) -> None:
    base: Base = opened()  # type: ignore[operator]
    z, t, conditioned = all_told(base)
    made, passes = branch(base), Counted(base)
    try:
        with torch.no_grad():
            found = guided_velocity(base, made, z, t, conditioned, SamplerSettings(guidance=1.0))
            assert passes.count == 1
            stronger = guided_velocity(base, made, z, t, conditioned, SamplerSettings(guidance=2.5))
            assert passes.count == 3
    finally:
        passes.hook.remove()
    with torch.no_grad(), made.attached(base.network, conditioned.c, conditioned.c_r):
        v_c = base.velocity(z, t, conditioned.reference)
    assert torch.equal(found, v_c)
    with torch.no_grad():  # no hints, a white reference
        side = base.spatial * z.shape[-1]
        white = base.encode(torch.ones(1, 3, side, side))[None].expand(len(z), -1, -1, -1, -1)
        v_u = base.velocity(z, t, white)
    torch.testing.assert_close(stronger, v_u + 2.5 * (v_c - v_u), atol=1e-5, rtol=1e-5)


def test_the_reference_stays_clean_at_every_step() -> None:
    base = pixels()
    _, _, conditioned = all_told(base)
    seen: list[torch.Tensor] = []
    hook = base.network.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, :, 0].clone()))
    try:
        sample_latents(
            base, branch(base), conditioned, SamplerSettings(steps=3, guidance=1.0), torch.Generator().manual_seed(0)
        )
    finally:
        hook.remove()
    assert len(seen) == 3 and all(torch.equal(each, conditioned.reference[:, :, 0]) for each in seen)


def test_the_white_image_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.open(folder())
    _, _, conditioned = all_told(base)
    seen, whole = [], base.vae.encode
    monkeypatch.setattr(base.vae, "encode", lambda x: seen.append(x) or whole(x))
    sample_latents(
        base, branch(base), conditioned, SamplerSettings(steps=3, guidance=2.0), torch.Generator().manual_seed(0)
    )
    assert len(seen) == 1


class Exact:
    """Stands for a base whose flow leads straight to known data."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.channels, self.network = data, data.shape[1], None

    def velocity(self, z: torch.Tensor, t: torch.Tensor, reference: object) -> torch.Tensor:
        return (z - self.data) / t.view(-1, 1, 1, 1, 1)


class Silent:
    def attached(self, *_: object) -> object:
        import contextlib

        return contextlib.nullcontext()


def test_drawing_follows_the_flow_to_its_end() -> None:
    data = torch.randn(2, 3, 2, 4, 4)
    conditioned = Conditions(torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 7, 2, 4, 4), torch.zeros(2, 4, 1, 4, 4))
    how = SamplerSettings(steps=12, guidance=1.0)
    found = sample_latents(Exact(data), Silent(), conditioned, how, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    torch.testing.assert_close(found, data, atol=2e-3, rtol=1e-3)


def test_conditions_hide_the_object_and_a_ring_around_it() -> None:
    base, found = pixels(), textured_object(0, 32, 2)
    frames, mask = torch.from_numpy(found.composite), torch.from_numpy(found.mask)
    image, where = (torch.from_numpy(each) for each in found.own)
    puzzle = Jigsaw()(image, where, np.random.default_rng(0), smallest=4)
    z_unt = base.encode(torch.from_numpy(found.untextured))
    branch_inputs = conditions(base, frames, mask, z_unt, puzzle, 3)
    hole = dilate_mask(mask, 3)
    background, plain, marked = branch_inputs.c[0].split([3, 3, 1])
    assert torch.equal(background.movedim(1, 0), frames * (1 - hole))
    assert torch.equal(plain, z_unt) and torch.equal(marked.movedim(1, 0), hole)
    assert torch.equal(branch_inputs.reference[0, :, 0], puzzle.image)
    assert torch.equal(branch_inputs.c_r[0, :, 0], torch.cat([puzzle.image, puzzle.mask]))


def given(base: Base, frames: int = 1, side: int = 32) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    found, other = textured_object(0, side, frames), textured_object(1, side)
    clip = (torch.from_numpy(found.composite), torch.from_numpy(found.mask))
    return clip, (torch.from_numpy(other.cross[0]), torch.from_numpy(other.cross[1]))


@pytest.mark.parametrize(("opened", "frames"), [(pixels, 3), (latents, 1), (latents, 5), (halved, 5)])
def test_a_clip_is_retextured_from_end_to_end(opened: object, frames: int) -> None:
    base: Base = opened()  # type: ignore[operator]
    clip, shown = given(base, frames)
    remover, made = TextureRemover.fresh(base), branch(base)
    how = {"sampling": SamplerSettings(steps=2), "jigsaw": Jigsaw(0.25)}
    one, same, other = (
        retexture(base, made, remover, clip, shown, seed=seed, **how)  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    assert one.frames.shape == one.untextured.shape == (frames, 3, 32, 32)
    assert float(one.frames.abs().max()) <= 1
    assert torch.equal(one.frames, same.frames) and torch.equal(one.untextured, same.untextured)
    assert not torch.equal(one.untextured, other.untextured)  # the remover's noise follows the seed, too
    alone = retexture(base, made, remover, clip, shown, seed=0, sampling=SamplerSettings(steps=2, scale=0.0))
    assert not torch.equal(one.frames, alone.frames)
    none = retexture(base, branch(base, silent=True), remover, clip, shown, sampling=SamplerSettings(steps=2))
    torch.testing.assert_close(none.frames, alone.frames, atol=1e-4, rtol=1e-3)


def test_other_random_numbers_do_not_matter() -> None:
    base = pixels()
    clip, shown = given(base)
    remover, made = TextureRemover.fresh(base), branch(base)
    found = []
    for number in (1, 2):
        torch.manual_seed(number)
        np.random.seed(number)
        found.append(retexture(base, made, remover, clip, shown, sampling=SamplerSettings(steps=1), seed=3).frames)  # type: ignore[arg-type]
    assert torch.equal(*found)


def test_sizes_are_refused_in_one_line() -> None:
    base = pixels()
    (frames, mask), shown = given(base)
    made, remover = branch(base), TextureRemover.fresh(base)

    def refused(message: str, clip: object, reference: object = shown, on: Base = base) -> None:
        with pytest.raises(MethodError, match=message) as error:
            retexture(on, made, remover, clip, reference)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    refused("give multiples of 4", (frames[..., :30], mask[..., :30]))
    refused("give one mask per frame, of the same size", (frames, mask[..., :28]))
    refused("the mask is empty", (frames, 0 * mask))
    refused("give one of the frames' size", (frames, mask), (shown[0][..., :28], shown[1][..., :28]))
    refused("has no object:", (frames, mask), (shown[0], 0 * shown[1]))
    three = (frames.expand(3, -1, -1, -1), mask.expand(3, -1, -1, -1))
    refused("give a multiple of 4 plus one", three, shown, latents())


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"guidance": 0.5}, {"scale": -1.0}, {"dilate": -1}, {"removal": 0}, {"guidance": float("nan")}],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MethodError, match="to 1000"):
        SamplerSettings(**wrong)  # type: ignore[arg-type]


def test_text_needs_something_that_encodes_it() -> None:
    with pytest.raises(MethodError, match="has no text encoder"):
        pixels().text("an old car")
    assert not latents().text().any() and latents().text().shape == (1, 512, 12)


def test_a_vace_networks_main_blocks_are_the_base() -> None:
    base = latents()
    whole = diffusers.WanVACETransformer3DModel.from_pretrained(base.folder / "transformer").eval()  # type: ignore[operator]
    given, text = branch_inputs(base, frames=2), base.text().expand(2, -1, -1)
    frames = torch.cat([given["reference"], given["z"]], dim=2)
    silent = {"control_hidden_states": torch.zeros(2, 96, 3, 8, 8), "control_hidden_states_scale": torch.zeros(2)}
    with torch.no_grad():
        expected = whole(frames, 1000 * given["t"], text, **silent).sample[:, :, 1:]
        found = base.velocity(given["z"], given["t"], given["reference"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert set(base.vace) == {name for name in whole.state_dict() if name.startswith("vace_blocks")}


def test_latents_are_those_of_wans_pipeline() -> None:
    base = latents()
    frames = torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = base.vae.encode(frames.movedim(1, 0)[None]).latent_dist.mean[0]
    mean, deviation = (
        torch.tensor(getattr(base.vae.config, f"latents_{name}")).view(-1, 1, 1, 1) for name in ("mean", "std")
    )
    torch.testing.assert_close(base.encode(frames), (raw - mean) / deviation, atol=1e-5, rtol=1e-5)
    assert base.encode(frames).shape == (4, 2, 2, 2) and base.decode(base.encode(frames)).shape == (5, 3, 16, 16)
    assert (base.spatial, base.temporal, base.token) == (8, 4, 16) and base.control_channels == (72, 68)


def test_a_fresh_remover_of_latents_is_the_base_until_its_control_learns() -> None:
    plain = Base.open(latents().folder)  # type: ignore[arg-type]
    without = Base(copy.deepcopy(plain.network), plain.vae, "without VACE")
    remover = TextureRemover.fresh(without)
    given = branch_inputs(without)
    with torch.no_grad():
        expected = without.velocity(given["z"], given["t"])
        found = remover.velocity(given["z"], given["t"], torch.randn_like(given["z"]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trained = [name for name, _ in remover.named_parameters() if remover.trains(name)]
    assert trained and all(name.startswith("network.vace") for name in trained)
    begun = TextureRemover.fresh(plain).network.state_dict()
    assert all(torch.equal(begun[name], each) for name, each in plain.vace.items())


def test_a_remover_begins_with_vaces_blocks_where_these_are() -> None:
    base = Base.open(folder(layers=(0, 1), depth=4))
    assert TextureRemover.fresh(base).network.config.vace_layers == [0, 1]
    without = Base(base.network, base.vae, "without VACE")
    assert TextureRemover.fresh(without).network.config.vace_layers == [0, 2]


def test_a_remover_of_bfloat16_trains_in_float32() -> None:
    base = halved()
    remover, given = TextureRemover.fresh(base), branch_inputs(base)
    kinds = {name: each.dtype for name, each in remover.named_parameters()}
    assert all(kinds[name] == torch.float32 for name in kinds if remover.trains(name))
    assert kinds["network.proj_out.weight"] == torch.bfloat16
    whole = TextureRemover(copy.deepcopy(remover.network).float())
    with torch.no_grad():
        ours, theirs = (each.velocity(given["z"], given["t"], given["z"]) for each in (remover, whole))
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_the_size_that_is_worked_on_is_whole_tokens_within_the_area() -> None:
    for height, width in ((480, 832), (1080, 1920), (333, 517), (16, 4000)):
        ours = latents().size_for(height, width)
        assert ours[0] * ours[1] <= 480 * 832 and not ours[0] % 16 and not ours[1] % 16
    assert latents().size_for(480, 832) == (480, 832)
    with pytest.raises(MethodError, match="give a larger image"):
        latents().size_for(12, 200)
