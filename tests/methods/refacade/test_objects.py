"""The generator: what is drawn apart stays apart, and its truth is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lamella.errors import MethodError
from lamella.methods.refacade import dilate_mask, judge, textured_object
from lamella.methods.refacade.objects import AMBIENT, PLAIN, TURN, ObjectScene, Texture, render
from lamella.methods.refacade.shapes import Solid


def of_sphere() -> ObjectScene:
    shape = Solid("ellipsoid", (0.5, 0.5, 0.5), 2.0, (0.3, 0.2, 0.1), (0.0, 0.0))
    return ObjectScene(shape, (0.6, 0.0, 0.8), ((0.0, 0.5, 1.0), (1.0, 0.5, 0.0), 0.3))


def test_a_sphere_is_seen_as_geometry_says() -> None:
    surface = of_sphere().shape.surface(32)
    ticks = (np.arange(32) + 0.5) / 16 - 1
    x, y = np.meshgrid(ticks, -ticks)
    inside = x**2 + y**2 < 0.25
    # the grid of depths may miss a rim that is thinner than a cell of it
    assert (surface.mask & ~inside).sum() == 0 and (inside & ~surface.mask).sum() < 0.06 * inside.sum()
    z = np.sqrt(np.maximum(0.25 - x**2 - y**2, 0))
    normals = np.stack([x, y, z], axis=-1) / 0.5
    np.testing.assert_allclose(surface.height[surface.mask], z[surface.mask], atol=1e-3)
    np.testing.assert_allclose(surface.normals[surface.mask], normals[surface.mask], atol=5e-3)


def test_a_plain_twin_is_lamberts() -> None:
    scene = of_sphere()
    surface = scene.shape.surface(32)
    expected = PLAIN * (AMBIENT + (1 - AMBIENT) * np.maximum(0, surface.normals @ np.array(scene.light)))
    np.testing.assert_allclose(render(scene, surface, None)[surface.mask][:, 1], expected[surface.mask], atol=1e-12)


def test_twins_of_two_textures_are_the_same() -> None:
    scene, drawn = of_sphere(), np.random.default_rng(0)
    surface = scene.shape.surface(24)
    one, other = (Texture.random(drawn, pattern) for pattern in ("checks", "dots"))
    shading = render(scene, surface, None) / PLAIN
    for texture in (one, other):  # what is left when the texture is divided away
        left = render(scene, surface, texture) / texture.albedo(surface.uv)
        np.testing.assert_allclose(left, shading, atol=1e-12)
    assert np.abs(render(scene, surface, one) - render(scene, surface, other)).max() > 0.1


def test_shape_texture_and_light_are_drawn_apart() -> None:
    found = [textured_object(number, 16) for number in range(60)]
    lights = [each.untextured[each.mask.repeat(3, 1) > 0].mean() for each in found]
    colours = [each.own[0][:, each.own[1][0] > 0].mean() for each in found]
    sizes = [each.mask.mean() for each in found]
    others = [each.cross[1].mean() for each in found]
    for one, other in ((colours, sizes), (sizes, others), (lights, sizes)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.4


def test_parts_and_seeds_differ_and_a_seed_is_one_object() -> None:
    one = textured_object(3, 16)
    for part, again in zip(one[:6], textured_object(3, 16)[:6], strict=True):
        np.testing.assert_array_equal(part, again)
    for other in (textured_object(4, 16), textured_object(3, 16, part="test"), textured_object(3, 16, part="unseen")):
        assert np.abs(one.composite - other.composite).max() > 0.1


def test_a_clip_moves_and_its_background_does_not() -> None:
    found = textured_object(5, 24, frames=4)
    assert found.composite.shape == (4, 3, 24, 24) and found.mask.shape == (4, 1, 24, 24)
    assert np.abs(found.untextured[0] - found.untextured[3]).max() > 0.02
    outside = (found.mask.max(axis=0) == 0).repeat(3, 0)
    np.testing.assert_array_equal(found.composite[0][outside], found.composite[3][outside])


def test_outside_the_dilated_mask_the_composite_is_its_background() -> None:
    import torch

    found = textured_object(7, 32)
    composite, mask = torch.from_numpy(found.composite), torch.from_numpy(found.mask)
    hole = dilate_mask(mask, 3)
    background = composite * (1 - hole)
    outside = hole.expand_as(composite) == 0
    assert torch.equal((composite - background)[outside], torch.zeros_like(composite)[outside])
    donor = torch.from_numpy(found.donor)
    assert torch.equal(donor[outside], composite[outside])  # whatever the texture


@pytest.mark.parametrize("given", [{"res": 4}, {"frames": 0}])
def test_images_without_pixels_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(MethodError, match="give images of at least 8 x 8"):
        textured_object(0, **given)


def test_a_turned_shape_is_another_view_of_the_same() -> None:
    shape = Solid("box", (0.3, 0.4, 0.5), 2.0, (0.4, 0.2, 0.0), (0.0, 0.0))
    quarter = replace(shape, angles=(0.4, 0.2, np.pi / 2))
    np.testing.assert_array_equal(np.rot90(shape.surface(32).mask), quarter.surface(32).mask)


def test_along_the_true_flow_a_texture_stays_and_along_no_other() -> None:
    for seed in range(3):
        each = textured_object(seed, res=64, frames=3)
        clip, where = judge.unit(each.composite), each.mask[:, 0] > 0
        right = judge.warp_error(clip, where, each.centre, TURN)
        assert right < 0.6 * judge.warp_error(clip, where, each.centre, 0.0)
        assert right < 0.6 * judge.warp_error(clip, where, each.centre, -TURN)
        still = np.stack([clip[0]] * 3)
        assert judge.warp_error(still, np.stack([where[0]] * 3), each.centre, 0.0) < 1e-12


def test_the_warp_error_of_a_quarter_turn_is_that_of_pixels_that_change_places() -> None:
    drawn = np.random.default_rng(0)
    first = drawn.uniform(0, 1, (8, 8, 3))
    turned = np.rot90(first)  # against the clock
    changed = turned.copy()
    changed[2, 3] += 0.5
    everywhere = np.ones((2, 8, 8), bool)
    quarter = ((0.0, 0.0), np.pi / 2)
    assert judge.warp_error(np.stack([first, turned]), everywhere, *quarter) < 1e-12
    assert judge.warp_error(np.stack([first, changed]), everywhere, *quarter) == pytest.approx(0.25 / 64, rel=1e-6)
