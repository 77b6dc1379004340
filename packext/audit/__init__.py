"""One report of what sharing gradients of a model gives away, on the user's own model and data, in process."""

from packext.audit._run import SCHEMA as SCHEMA
from packext.audit._run import Audit as Audit
from packext.audit._run import run as run
from packext.audit.closed import Closed as Closed
from packext.audit.closed import EmbeddingCheck as EmbeddingCheck
from packext.audit.closed import LayerCheck as LayerCheck
from packext.audit.findings import Finding as Finding
from packext.audit.inversion import Inversion as Inversion
from packext.audit.inversion import SearchResult as SearchResult
from packext.audit.inversion import TextResult as TextResult
from packext.audit.labels import Labels as Labels
from packext.audit.labels import RuleResult as RuleResult
from packext.audit.records import Epsilon as Epsilon
from packext.audit.records import Membership as Membership
from packext.audit.records import Record as Record
from packext.audit.records import Records as Records
from packext.audit.records import ScoreResult as ScoreResult
from packext.audit.section import Interval as Interval
from packext.audit.section import Section as Section
from packext.audit.setting import Integrity as Integrity
from packext.audit.setting import Setting as Setting
from packext.audit.sharing import Budget as Budget
from packext.audit.sharing import Data as Data
from packext.audit.sharing import Sharing as Sharing
from packext.audit.sweep import Defended as Defended
from packext.audit.sweep import Sweep as Sweep
