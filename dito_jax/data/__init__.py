"""Data sets (digits, strokes, image folders, tar shards, Parquet, latents) and the input pipeline."""

from dito_jax.data.array_record import write_array_record as write_array_record
from dito_jax.data.checking import check_examples as check_examples
from dito_jax.data.digits import DigitsData as DigitsData
from dito_jax.data.image_folder import ImageFolderData as ImageFolderData
from dito_jax.data.latents import LatentsData as LatentsData
from dito_jax.data.parquet import ParquetData as ParquetData
from dito_jax.data.pipeline import batches as batches
from dito_jax.data.sources import (
    SPLIT_NAMES as SPLIT_NAMES,
    Batch as Batch,
    DataError as DataError,
    Example as Example,
    Source as Source,
    arrays as arrays,
    class_names as class_names,
    drawn as drawn,
    notes as notes,
)
from dito_jax.data.strokes import StrokesData as StrokesData
from dito_jax.data.webdataset import WebDatasetData as WebDatasetData
