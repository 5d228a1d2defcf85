"""How images are cut, and what mixes and samples slices: against plain loops, pooling and attention of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lamella.errors import MethodError
from lamella.methods.hires_llava import SelfMiningSampler, SliceGrid, SliceRestore, Slicing, TileLayout, cut, merge
from lamella.methods.hires_llava.slicing import END, make_tiles

WIDTH = 12
SLICING = Slicing(16, 4, most=6, window=2)
ACROSS = SLICING.across
pixels = st.integers(1, 200)


def trained(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """With nothing left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.parameters():
        each.data = each + 0.3 * torch.randn(each.shape, generator=generator)
    return module


def states(slices: TileLayout, seed: int = 1) -> Tensor:
    """What a tower might hold: one token beside patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slices.starts[-1], 1 + ACROSS**2, WIDTH, generator=generator)


def patches(h: Tensor) -> Tensor:
    return h[:, 1:].unflatten(1, (ACROSS, ACROSS))


@given(pixels, pixels, st.integers(1, 9))
def test_a_grid_has_at_most_so_many_slices_and_is_as_large_as_it_may(height: int, width: int, most: int) -> None:
    slicing = Slicing(16, 4, most=most)
    grid = slicing.fit(height, width)
    assert grid.rows * grid.columns <= most
    assert 0 < grid.height <= slicing.reach(grid.rows) and 0 < grid.width <= slicing.reach(grid.columns)
    if -(-height // 16) * -(-width // 16) <= most:
        assert grid[2:] == (height, width)
        return
    best = max(min(16 * n / height, 16 * (most // n) / width) for n in range(1, most + 1))
    assert grid.height == max(1, int(height * best + 1e-6)) and grid.width == max(1, int(width * best + 1e-6))


@given(pixels, pixels, st.sampled_from(["raster", "slices"]), st.sampled_from([0, 8]))
def test_an_image_is_read_once_and_in_order(height: int, width: int, order: str, overlap: int) -> None:
    slicing = Slicing(16, 4, most=6, overlap=overlap, order=order)  # type: ignore[arg-type]
    grid = slicing.fit(height, width)
    read = slicing.reading(grid)
    kept = [each for each in read if each != END]
    assert len(set(kept)) == len(kept) and read[-1] == END
    cells, window = slicing.cells, slicing.window * slicing.patch
    places = []
    for number in kept:
        tile, inside = divmod(number, cells**2)
        row, column = divmod(inside, cells)
        down, along = divmod(tile, grid.columns)
        places.append((down * (16 - overlap) + row * window, along * (16 - overlap) + column * window))
    assert all(y < grid.height and x < grid.width for y, x in places)
    if not overlap:
        everything = {(y, x) for y in range(0, grid.height, window) for x in range(0, grid.width, window)}
        assert set(places) == everything
        assert order == "slices" or places == sorted(places)
    ends = grid.rows * grid.columns if order == "slices" else None
    assert ends is None or read.count(END) == ends
    assert slicing.tokens(grid.height, grid.width) == slicing.across**2 + 1 + len(read)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_slices_are_merged_by_where_they_lie_and_cut_again(rows: int, columns: int) -> None:
    y, x = torch.meshgrid(torch.arange(rows * ACROSS), torch.arange(columns * ACROSS), indexing="ij")
    image = torch.stack([y, x], dim=-1)
    slices = torch.stack([
        image[r * ACROSS : (r + 1) * ACROSS, c * ACROSS : (c + 1) * ACROSS] for r in range(rows) for c in range(columns)
    ])  # fmt: skip
    merged = merge(slices[None], rows, columns)
    assert torch.equal(merged[0], image)
    assert torch.equal(cut(merged, rows, columns)[0], slices)


def test_tiles_show_the_image_where_it_lies() -> None:
    image = torch.arange(3 * 20 * 30.0).view(3, 20, 30)
    tiles, grid = make_tiles(image, SLICING, lambda image, height, width: image[:, :height, :width], [1.0, 2.0, 3.0])
    assert grid == SliceGrid(2, 2, 20, 30) and tiles.shape == (5, 3, 16, 16)
    whole = torch.tensor([1.0, 2.0, 3.0])[:, None, None].repeat(1, 32, 32)
    whole[:, :20, :30] = image
    for number in range(4):
        r, c = divmod(number, 2)
        assert torch.equal(tiles[1 + number], whole[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16])


GRIDS = (SliceGrid(2, 2, 32, 32), SliceGrid(1, 1, 16, 16), SliceGrid(2, 3, 20, 41), SliceGrid(2, 2, 25, 32))


@pytest.mark.parametrize("branches", ["local", "global", "both"])
def test_a_fresh_adapter_changes_nothing_to_the_bit(branches: str) -> None:
    slices = TileLayout(SLICING, GRIDS)
    h = states(slices)
    assert torch.equal(SliceRestore(WIDTH, branches)(h, slices), h)  # type: ignore[arg-type]


def test_views_single_slices_and_other_tokens_stay_as_they_are_to_the_bit() -> None:
    slices = TileLayout(SLICING, GRIDS)
    h = states(slices)
    out = trained(SliceRestore(WIDTH))(h, slices)
    single = slices.starts[1] + 1
    assert torch.equal(out[slices.views], h[slices.views]) and torch.equal(out[single], h[single])
    assert torch.equal(out[:, 0], h[:, 0]) and not torch.allclose(out, h)


def test_an_adapter_is_what_its_formula_says() -> None:
    """F + gate * conv(LN F) + up(enlarge(small + attention(LN small))), in float64 and by loops."""
    adapter = trained(SliceRestore(WIDTH)).double()
    slices = TileLayout(SLICING, (SliceGrid(2, 3, 32, 48),))
    h = states(slices).double()
    f = torch.empty(2 * ACROSS, 3 * ACROSS, WIDTH, dtype=torch.float64)
    for number, tile in enumerate(patches(h[1:])):
        r, c = divmod(number, 3)
        f[r * ACROSS : (r + 1) * ACROSS, c * ACROSS : (c + 1) * ACROSS] = tile
    x = adapter.norm(f)
    local, kernel = torch.zeros_like(x), adapter.local.mix.weight[:, 0]
    for i in range(f.shape[0]):
        for j in range(f.shape[1]):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < f.shape[0] and 0 <= j + dj < f.shape[1]:
                        local[i, j] += kernel[:, di + 1, dj + 1] * x[i + di, j + dj]
    local = adapter.local.gate * (local + adapter.local.mix.bias)
    blocks = x.view(ACROSS, 2, ACROSS, 3, WIDTH).mean((1, 3))
    small = adapter.overall.down(blocks)
    tokens = adapter.overall.norm(small).flatten(0, 1)
    attention = adapter.overall.attention
    q, (k, v) = attention.query(tokens), attention.key_value(tokens).chunk(2, -1)
    assert attention.heads == 1
    small = small + attention.out(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v).view_as(small)
    wide = torch.nn.functional.interpolate(small.permute(2, 0, 1)[None], f.shape[:2], mode="bilinear")[0].permute(
        1, 2, 0
    )
    expected = f + local + adapter.overall.up(wide)
    out = merge(patches(adapter(h, slices)[1:])[None], 2, 3)[0]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # enlarging is done in float32


def test_what_is_no_image_does_not_matter() -> None:
    adapter, slices = trained(SliceRestore(WIDTH)), TileLayout(SLICING, (SliceGrid(2, 3, 20, 41),))
    h = states(slices)
    real = torch.cat([torch.ones(1, ACROSS, ACROSS, dtype=torch.bool), slices.slicing.real(slices.grids[0])])
    noisy = h.clone()
    noisy[:, 1:] += 100 * torch.randn(noisy[:, 1:].shape) * ~real.flatten(1)[..., None]
    assert not torch.equal(noisy, h)
    assert torch.equal(patches(adapter(h, slices))[real], patches(adapter(noisy, slices))[real])


def test_places_without_any_image_lend_nothing_to_others() -> None:
    """Of an image that ends on a place of the small map, what the attention makes of empty places does not matter."""
    adapter, slices = trained(SliceRestore(WIDTH, "global")), TileLayout(SLICING, (SliceGrid(2, 2, 24, 32),))
    h = states(slices)
    before = adapter(h, slices)
    attention = adapter.overall.attention  # type: ignore[union-attr]
    original = attention.forward

    def loud(x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        return original(x, context, seen) + 1e3 * ~seen[..., None]

    attention.forward = loud  # type: ignore[method-assign, assignment]
    real = torch.cat([torch.ones(1, ACROSS, ACROSS, dtype=torch.bool), SLICING.real(slices.grids[0])])
    torch.testing.assert_close(patches(adapter(h, slices))[real], patches(before)[real])


def test_images_of_other_grids_in_the_batch_change_nothing() -> None:
    adapter, slices = trained(SliceRestore(WIDTH)), TileLayout(SLICING, GRIDS)
    h = states(slices)
    together = adapter(h, slices)
    order = [2, 0, 3, 1]
    pieces = [h[slices.starts[each] : slices.starts[each + 1]] for each in order]
    permuted = adapter(torch.cat(pieces), TileLayout(SLICING, tuple(GRIDS[each] for each in order)))
    expected = torch.cat([together[slices.starts[each] : slices.starts[each + 1]] for each in order])
    torch.testing.assert_close(permuted, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("branches", ["local", "global", "both"])
def test_a_seam_is_crossed_by_the_adapter_and_not_when_it_is_confined(branches: str) -> None:
    slices = TileLayout(SLICING, (SliceGrid(2, 2, 32, 32),))
    for confined in (False, True):
        adapter = trained(SliceRestore(WIDTH, branches, confined=confined))  # type: ignore[arg-type]
        h = states(slices).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(patches(adapter(h, slices))[1].square().sum(), h)
        assert (gradient[2:].abs().max() > 0) != confined
        assert gradient[1].abs().max() > 0 and gradient[0].abs().max() == 0


def test_a_confined_adapter_has_as_many_parameters_and_is_the_adapter_on_each_slice() -> None:
    free, confined = trained(SliceRestore(WIDTH)), trained(SliceRestore(WIDTH, confined=True))
    confined.load_state_dict(free.state_dict())
    slices = TileLayout(SLICING, (SliceGrid(2, 2, 32, 32),))
    h = states(slices)
    out = confined(h, slices)
    for tile in range(1, 5):
        f = patches(h[tile : tile + 1])
        alone = free.mixed(f, torch.ones(f.shape[:3], dtype=torch.bool), 1, 1)  # type: ignore[operator]
        torch.testing.assert_close(patches(out[tile : tile + 1]), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", ["window", "slice"])
def test_a_fresh_sampler_is_average_pooling(scope: str) -> None:
    x = torch.randn(3, ACROSS, ACROSS, WIDTH)
    out = SelfMiningSampler(WIDTH, 2, scope)(x, torch.ones(3, ACROSS, ACROSS, dtype=torch.bool))  # type: ignore[arg-type]
    torch.testing.assert_close(out, avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))


def test_a_query_reads_its_own_window_alone() -> None:
    x, real = torch.randn(1, ACROSS, ACROSS, WIDTH), torch.ones(1, ACROSS, ACROSS, dtype=torch.bool)
    other = x.clone()
    other[0, 2, 1] += torch.randn(WIDTH)  # in the window of row 1, column 0
    for scope, moved in (("window", {(1, 0)}), ("slice", {(0, 0), (0, 1), (1, 0), (1, 1)})):
        sampler = trained(SelfMiningSampler(WIDTH, 2, scope))  # type: ignore[arg-type]
        differs = (sampler(x, real) != sampler(other, real)).any(-1)[0]
        assert {(int(r), int(c)) for r, c in differs.nonzero()} == moved


def test_a_sampler_is_what_its_formula_says() -> None:
    sampler = trained(SelfMiningSampler(WIDTH, 2)).double()
    x, real = torch.randn(1, 4, 4, WIDTH, dtype=torch.float64), torch.ones(1, 4, 4, dtype=torch.bool)
    real[0, 3, 2:] = False
    out = sampler(x, real)
    for row in range(2):
        for column in range(2):
            window = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, WIDTH)
            window = window[real[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()]
            q = window.mean(0, keepdim=True)
            attention = sampler.attention
            query = attention.query(sampler.norm_query(q))
            k, v = attention.key_value(sampler.norm_value(window)).chunk(2, -1)
            o = q + attention.out(torch.softmax(query @ k.T / WIDTH**0.5, -1) @ v)
            o = o + sampler.ffn(sampler.norm(o))
            torch.testing.assert_close(out[0, row, column], o[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 30, "patch": 4}, "cannot be divided into windows"),
        ({"side": 32, "patch": 4, "window": 3}, "cannot be divided into windows"),
        ({"side": 32, "patch": 4, "window": 0}, "cannot be divided into windows"),
        ({"side": 32, "patch": 4, "window": -1}, "cannot be divided into windows"),
        ({"side": 32, "patch": 4, "most": 0}, "give at least one slice"),
        ({"side": 32, "patch": 4, "overlap": 32}, "multiple of the patch size"),
        ({"side": 32, "patch": 4, "overlap": 3}, "multiple of the patch size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        Slicing(**settings)  # type: ignore[arg-type]
