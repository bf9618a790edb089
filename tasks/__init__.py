"""What train.py can train: the tasks by name.

A task makes data, model, losses, export and report from a recipe; `bert_task.py` shows what
train.py asks of one.
"""

from tasks.bert import BertPretraining
from tasks.resnet import ImageClassification
from tasks.squad import SquadFineTuning

TASKS = {"bert": BertPretraining, "squad": SquadFineTuning, "resnet": ImageClassification}
