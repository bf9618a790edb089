"""What train.py can train: the tasks by name.

A task makes data, model, losses, export and report from a recipe; `bert_task.py` shows what
train.py asks of one.
"""

from training.bert_task import BertPretraining
from training.image_task import ImageClassification
from training.squad_task import SquadFineTuning

TASKS = {"bert": BertPretraining, "squad": SquadFineTuning, "resnet": ImageClassification}
