"""What train.py can train: the tasks by name. `task.py` declares what a task is."""

from tasks.bert import BertPretraining
from tasks.resnet import ImageClassification
from tasks.squad import SquadFineTuning

TASKS = {"bert": BertPretraining, "squad": SquadFineTuning, "resnet": ImageClassification}
