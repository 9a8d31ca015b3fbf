"""Datasets and collators for LLaVA's conversation JSON, which check every record."""

from vlm_fast.training.data.collator import Collator as Collator
from vlm_fast.training.data.datasets import Caption as Caption
from vlm_fast.training.data.datasets import Captions as Captions
from vlm_fast.training.data.datasets import CheckResult as CheckResult
from vlm_fast.training.data.datasets import Conversations as Conversations
from vlm_fast.training.data.datasets import Example as Example
from vlm_fast.training.data.datasets import ReplacedRecordWarning as ReplacedRecordWarning
from vlm_fast.training.data.datasets import UnusedKeyWarning as UnusedKeyWarning
from vlm_fast.training.data.datasets import check as check
from vlm_fast.training.data.record_errors import BadRecord as BadRecord
from vlm_fast.training.data.record_errors import RecordIssue as RecordIssue
from vlm_fast.training.data.records import Records as Records
from vlm_fast.training.data.records import Turn as Turn
