"""The paper's vision transformer, from timm's building blocks.

Paper: the experimental setting: width 512, depth 6, heads 8, MLP 512, patch 2 on 32 x 32 images, dropout 0.1.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

DROPOUT = 0.1
DEPTH = 6


class ViT(VisionTransformer):
    """timm's vision transformer at the paper's size, for images whose sides are multiples of 2."""

    def __init__(self, *, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=2,
            in_chans=in_channels,
            num_classes=num_classes,
            embed_dim=512,
            depth=DEPTH,
            num_heads=8,
            mlp_ratio=1.0,
            pos_drop_rate=DROPOUT,
            proj_drop_rate=DROPOUT,
            attn_drop_rate=DROPOUT,
        )

    def layer_group_prefixes(self) -> dict[str, list[str]]:
        """Return the specification's groups: patch embedding, one a transformer block, head."""
        groups = {"patch_embedding": ["cls_token", "pos_embed", "patch_embed"]}
        groups |= {f"block{i + 1}": [f"blocks.{i}"] for i in range(DEPTH)}
        return groups | {"head": ["norm", "head"]}
