"""The tasks that train.py can train, by name. `task.py` defines their interface."""

from tasks.bert import BertPretraining
from tasks.resnet import ImageClassification
from tasks.squad import SquadFineTuning

TASKS = {"bert": BertPretraining, "squad": SquadFineTuning, "resnet": ImageClassification}
