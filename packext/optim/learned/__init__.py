"""A step size that is set anew at each step by a policy that was learned on other tasks (Daniel et al., 2016)."""

from packext.optim.learned.controller import LearnedRate as LearnedRate
from packext.optim.learned.policy import Averages as Averages
from packext.optim.learned.policy import Policy as Policy
from packext.optim.learned.policy import log_rate as log_rate
from packext.optim.learned.policy import observation as observation
from packext.optim.learned.policy import trained as trained
from packext.optim.learned.reps import Search as Search
from packext.optim.learned.reps import reps as reps
from packext.optim.learned.reps import weights as weights
