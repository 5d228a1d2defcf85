"""The types of data that methods take, and their loaders."""

from lamella.data.captioned import Captioned, CaptionedImages, LabelledImages
from lamella.data.context import InputContext
from lamella.data.decoding import Sampling, decode
from lamella.data.documents import Document, Documents, hold_out, seed_of
from lamella.data.encoded import Encoded
from lamella.data.endpoint import Endpoint
from lamella.data.examples import Examples, read_examples
from lamella.data.image_text import ImageText
from lamella.data.lazy import Lazy, batches
from lamella.data.mixture import Blend, Mixture, Pick, mix
from lamella.data.processing import MARK, ImageTextRow, Processing, open_processing
from lamella.data.prompts import Prompts
from lamella.data.records import Records, SampledRecords, TextRecord, read_records
from lamella.data.rollout import rollout
from lamella.data.rows import Rows
from lamella.data.samples import Passages, Sample, Samples
from lamella.data.sources import BUILT_IN, PLAIN, Source, load_text, windows
from lamella.data.text import Text
from lamella.data.writer import Completion, LocalWriter, RemoteWriter, Writer, WritingRequest
from lamella.data.writing import own_texts, write

__all__ = [
    "BUILT_IN",
    "MARK",
    "PLAIN",
    "Blend",
    "Captioned",
    "CaptionedImages",
    "Completion",
    "Document",
    "Documents",
    "Encoded",
    "Endpoint",
    "Examples",
    "ImageText",
    "ImageTextRow",
    "InputContext",
    "LabelledImages",
    "Lazy",
    "LocalWriter",
    "Mixture",
    "Passages",
    "Pick",
    "Processing",
    "Prompts",
    "Records",
    "RemoteWriter",
    "Rows",
    "Sample",
    "SampledRecords",
    "Samples",
    "Sampling",
    "Source",
    "Text",
    "TextRecord",
    "Writer",
    "WritingRequest",
    "batches",
    "decode",
    "hold_out",
    "load_text",
    "mix",
    "open_processing",
    "own_texts",
    "read_examples",
    "read_records",
    "rollout",
    "seed_of",
    "windows",
    "write",
]
