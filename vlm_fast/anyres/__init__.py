"""AnyRes in whole numbers: which tiles an image is cut into, how many tokens it becomes, and where.

An image is shown to the tower as a base tile (all of it, small) and a grid of tiles whose tokens,
stitched together, are cut back to the image's own shape: LLaVA-NeXT's "spatial_unpad". Everything
here is arithmetic on the host, the same as transformers' for every size; the tables it ends in
(`Plan`) are what `vlm_fast.ops.anyres_pack` moves rows by.
"""

from vlm_fast.anyres.tables import MAX_ROWS as MAX_ROWS
from vlm_fast.anyres.tables import ONE as ONE
from vlm_fast.anyres.tables import Plan as Plan
from vlm_fast.anyres.tables import lone_taps as lone_taps
from vlm_fast.anyres.tables import plan as plan
from vlm_fast.anyres.tiling import Size as Size
from vlm_fast.anyres.tiling import Stitched as Stitched
from vlm_fast.anyres.tiling import Tiling as Tiling
from vlm_fast.anyres.tiling import best_resolution as best_resolution
from vlm_fast.anyres.tiling import padding as padding
from vlm_fast.anyres.tiling import sizes_of as sizes_of
from vlm_fast.anyres.tiling import stitched as stitched
from vlm_fast.anyres.tiling import tile_count as tile_count
from vlm_fast.anyres.tiling import token_count as token_count
