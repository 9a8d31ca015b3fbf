"""What connectors are trained on: LLaVA's conversation JSON, checked, as a processor's inputs."""

from vlm_fast.data.collator import Collator as Collator
from vlm_fast.data.conversations import Caption as Caption
from vlm_fast.data.conversations import Captions as Captions
from vlm_fast.data.conversations import Checked as Checked
from vlm_fast.data.conversations import Conversations as Conversations
from vlm_fast.data.conversations import Example as Example
from vlm_fast.data.conversations import UnreadablePicture as UnreadablePicture
from vlm_fast.data.conversations import UnusedKey as UnusedKey
from vlm_fast.data.conversations import check as check
from vlm_fast.data.faults import BadRecord as BadRecord
from vlm_fast.data.faults import Fault as Fault
from vlm_fast.data.records import Records as Records
from vlm_fast.data.records import Turn as Turn
