"""Context pooling of token sequences in which every image has its own grid, and padding."""
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .context_pool import ContextPool2d
from .token_context_pool import SequenceMixer


@dataclass(frozen=True)
class TokenGrids:
    """The grids of the images of a batch `(B, P + N, C)`, P prefix tokens leading each sequence.

    Args:
        groups: `(images, height, width, full)` of images with like grids, pooled together; `full` says that no token of
            the grids is absent.
        source: None where the N tokens of every image are one grid, row by row. Else, for every position of the grids
            of all groups in turn, the index of its token in the flattened `(B * (P + N), C)`; 0 where it is absent.
        present: Whether a position has a token; None if all do.
        filled: Positions that have one, as indices; None if all do.
    """
    groups: tuple[tuple[int, int, int, bool], ...]
    source: Tensor | None = None
    present: Tensor | None = None
    filled: Tensor | None = None

    @classmethod
    def of_images(cls, images: int, height: int, width: int) -> 'TokenGrids':
        """Of images that all have the same full grid, row by row."""
        return cls(((images, height, width, True),))


@torch.compiler.disable
def find_grids(patch_coord: Tensor, patch_valid: Tensor | None = None, num_prefix_tokens: int = 0) -> TokenGrids:
    """The grids of patches with coordinates, as NaFlex loaders give them.

    The grid of an image reaches from row and column 0 to the largest of its valid patches. These may be in any order,
    and some may be missing. Coordinates of padding are ignored.

    Args:
        patch_coord: Row and column of every patch, integers `(B, N, 2)`.
        patch_valid: `(B, N)`, false for padding; all are valid if None.
        num_prefix_tokens: Number of tokens P before the patches of each image.

    Raises:
        ValueError: An image has no valid patch, a negative coordinate, or two patches with the same coordinates.
    """
    batch, length = patch_coord.shape[:2]
    device = patch_coord.device
    valid = torch.ones(batch, length, dtype=torch.bool, device=device) if patch_valid is None else patch_valid.bool()
    coord = patch_coord.long().masked_fill(~valid[..., None], 0)
    extents, counts, lowest = coord.amax(1) + 1, valid.sum(1), coord.amin((1, 2))
    place = coord[..., 0] * extents[:, 1:] + coord[..., 1]
    ordered = (valid & (place == torch.arange(length, device=device))).all(1)
    facts = torch.stack([*extents.unbind(1), counts, lowest, ordered], 1).tolist()

    groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for i, (height, width, count, least, _) in enumerate(facts):
        if not count:
            raise ValueError(f'image {i} of the batch has no valid patch: leave it out')
        if least < 0:
            raise ValueError(f'image {i} of the batch has a patch at coordinate {least}: count rows and columns from 0')
        groups[height, width, count == height * width].append(i)
    sizes = tuple((len(images), *key) for key, images in groups.items())
    if len(sizes) == 1 and sizes[0][1] * sizes[0][2] == length and all(fact[-1] for fact in facts):
        return TokenGrids(sizes)

    starts, size = [0] * batch, 0
    for (height, width, _), images in groups.items():
        for i in images:
            starts[i] = size
            size += height * width
    token = torch.arange(batch * (num_prefix_tokens + length), device=device).view(batch, -1)[:, num_prefix_tokens:]
    source = token.new_full((size,), -1)
    source[(place + token.new_tensor(starts)[:, None])[valid]] = token[valid]
    filled = (source >= 0).nonzero().flatten()
    doubles = sum(fact[2] for fact in facts) - len(filled)
    if doubles:
        raise ValueError(f'{doubles} valid patches of the batch lie at the place of another one of the same image: '
                         'give every patch its own row and column')
    if len(filled) == size:
        return TokenGrids(sizes, source)
    return TokenGrids(sizes, source.clamp(min=0), source >= 0, filled)


class NaFlexMixer(SequenceMixer):
    """What mixers of the tokens of images with their own grids share."""

    def to_map(self, x: Tensor, grids: TokenGrids | None) -> Tensor:
        """The grid tokens of `x` as a map `(B, C, H, W)`, a view.

        Raises:
            ValueError: The images have no grid in common.
        """
        if grids is None:
            raise ValueError('no grids are given: pass grids=TokenGrids.of_images(...) or find_grids(...)')
        if grids.source is not None:
            raise ValueError(f'the images have {len(grids.groups)} kinds of grids, or padding: there is no common map')
        (_, height, width, _), = grids.groups
        return self.grid_map(x, height, width)

    @torch.compiler.disable
    def mix_groups(self, x: Tensor, grids: TokenGrids) -> Tensor:
        """Mixes tokens `(B, P + N, C)` of several grids, or with padding, group by group."""
        flat, source = x.flatten(0, 1), grids.source
        if source is None:
            raise ValueError('tokens of one full grid are not groups: call the module')
        packed = flat.index_select(0, source)
        sizes = [images * height * width for images, height, width, _ in grids.groups]
        present: Sequence[Tensor | None] = [None] * len(sizes)
        if grids.present is not None:
            packed = packed.masked_fill(~grids.present[:, None], 0)
            present = grids.present.split(sizes)
        pooled = []
        for tokens, mask, (images, height, width, full) in zip(packed.split(sizes), present, grids.groups, strict=True):
            here = None if mask is None or full else mask.view(images, 1, height, width)
            y = self.mix_gated(tokens.view(images, height, width, -1).permute(0, 3, 1, 2), here)
            pooled.append(y.permute(0, 2, 3, 1).flatten(0, 2))
        y = torch.cat(pooled)
        if grids.filled is not None:
            y, source = y.index_select(0, grids.filled), source.index_select(0, grids.filled)
        return flat.index_copy(0, source, y.type_as(flat)).view_as(x)

    def forward(self, x: Tensor, grids: TokenGrids | None = None) -> Tensor:
        if grids is not None and grids.source is not None:
            return self.mix_groups(x, grids)
        return self.from_map(x, self.mix_gated(self.to_map(x, grids)))


class NaFlexContextPool(NaFlexMixer, ContextPool2d):
    """`ContextPool2d` (stride 1) for tokens `(B, P + N, C)` of images with their own grids, with padding between them.

    Images with equal grids are pooled together, without padding, so the result of an image does not depend on the rest
    of the batch: supports are relative to its own grid. Prefix tokens and padding are returned unchanged and have no
    weight. Missing tokens of a grid have weight logits of -inf.

    Args:
        dim: Channels C.
        num_prefix_tokens: Leading tokens P that are not part of the grid (class, registers).
        **kwargs: More arguments of `ContextPool2d`.

    Raises:
        ValueError: An argument is out of range. On call: no grids are given, or the tokens do not fit them.
    """

    def maps(self, x: Tensor, grids: TokenGrids | None = None) -> tuple[Tensor, Tensor]:
        """Weight logits and supports (in tokens), both `(B, G, H, W)`, for images of one grid. Stores nothing."""
        return self.predict_maps(self.to_map(x, grids))
