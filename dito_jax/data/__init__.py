"""Data sets (digits, strokes, image folders, latents) and the input pipeline that makes batches of them."""

from dito_jax.data.array_record import write_array_record as write_array_record
from dito_jax.data.digits import DigitsData as DigitsData
from dito_jax.data.image_folder import ImageFolderData as ImageFolderData
from dito_jax.data.latents import LatentsData as LatentsData
from dito_jax.data.pipeline import batches as batches
from dito_jax.data.sources import (
    Batch as Batch,
    DataError as DataError,
    Example as Example,
    Source as Source,
    arrays as arrays,
    class_names as class_names,
    drawn as drawn,
)
from dito_jax.data.strokes import StrokesData as StrokesData
