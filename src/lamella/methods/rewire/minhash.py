"""Near-duplicates by datatrove's MinHash: its three steps, one after the other, over texts in memory.

Imported only where datatrove is installed. Its own tokenizer of English words needs spaCy; here words are what stands
between other characters.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as Piece
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from lamella.data.tasks import quietly
