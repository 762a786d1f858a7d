"""fedelta: federated learning of pre-trained models.

Everything that a user writes an experiment with is here; parts load on first use, so that `import fedelta` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedelta.adapters.fed_sb import FedSB as FedSB
    from fedelta.adapters.fedbpt import FedBPT as FedBPT
    from fedelta.adapters.fedex_lora import FedExLoRA as FedExLoRA
    from fedelta.adapters.fedkseed import FedKSeed as FedKSeed
    from fedelta.adapters.fedsa_lora import FedSALoRA as FedSALoRA
    from fedelta.adapters.ffa_lora import FFALoRA as FFALoRA
    from fedelta.adapters.flexlora import FlexLoRA as FlexLoRA
    from fedelta.adapters.flora import FLoRA as FLoRA
    from fedelta.adapters.flora_na import FLoRANA as FLoRANA
    from fedelta.adapters.hetlora import HetLoRA as HetLoRA
    from fedelta.adapters.lora_fair import LoRAFAIR as LoRAFAIR
    from fedelta.adapters.offsite import Emulator as Emulator
    from fedelta.adapters.offsite import Ends as Ends
    from fedelta.adapters.offsite import OffsiteTuning as OffsiteTuning
    from fedelta.adapters.rolora import RoLoRA as RoLoRA
    from fedelta.aggregation.mean import Mean as Mean
    from fedelta.aggregation.norm_bound import NormBound as NormBound
    from fedelta.algorithms.fedavg import FedAvg as FedAvg
    from fedelta.algorithms.federation import Federation as Federation
    from fedelta.algorithms.fedopt import FedAdagrad as FedAdagrad
    from fedelta.algorithms.fedopt import FedAdam as FedAdam
    from fedelta.algorithms.fedopt import FedAvgM as FedAvgM
    from fedelta.algorithms.fedopt import FedOpt as FedOpt
    from fedelta.algorithms.fedopt import FedYogi as FedYogi
    from fedelta.algorithms.fedprox import FedProx as FedProx
    from fedelta.algorithms.forecast import Link as Link
    from fedelta.algorithms.forecasting import forecast as forecast
    from fedelta.algorithms.planning import planned as planned
    from fedelta.algorithms.sampling import All as All
    from fedelta.algorithms.sampling import Cyclic as Cyclic
    from fedelta.algorithms.sampling import Fixed as Fixed
    from fedelta.algorithms.sampling import Poisson as Poisson
    from fedelta.algorithms.stopping import Converged as Converged
    from fedelta.algorithms.stopping import Target as Target
    from fedelta.core.examples import Examples as Examples
    from fedelta.core.keys import new_key as new_key
    from fedelta.core.parameters import Parameters as Parameters
    from fedelta.core.program import SiteData as SiteData
    from fedelta.core.program import run as run
    from fedelta.core.release import Budget as Budget
    from fedelta.core.release import Limit as Limit
    from fedelta.data.audio import AudioFormat as AudioFormat
    from fedelta.data.audio import audio_format as audio_format
    from fedelta.data.audio import read_audio as read_audio
    from fedelta.data.audio import read_audio_folder as read_audio_folder
    from fedelta.data.images import ImageFormat as ImageFormat
    from fedelta.data.images import image_format as image_format
    from fedelta.data.images import read_image_folder as read_image_folder
    from fedelta.data.images import read_images as read_images
    from fedelta.data.partition import IID as IID
    from fedelta.data.partition import Dirichlet as Dirichlet
    from fedelta.data.partition import Quantity as Quantity
    from fedelta.data.partition import Shards as Shards
    from fedelta.fleet.certificates import CertificateAuthority as CertificateAuthority
    from fedelta.fleet.local import Local as Local
    from fedelta.fleet.member import Member as Member
    from fedelta.fleet.remote import Remote as Remote
    from fedelta.fleet.revocations import Revocations as Revocations
    from fedelta.fleet.wire import Credentials as Credentials
    from fedelta.fleet.workers import Workers as Workers
    from fedelta.learning.bottleneck import Bottleneck as Bottleneck
    from fedelta.learning.closed_form import LDA as LDA
    from fedelta.learning.closed_form import Ridge as Ridge
    from fedelta.learning.kinds import AUDIO_CLASSIFICATION as AUDIO_CLASSIFICATION
    from fedelta.learning.kinds import CAUSAL_LANGUAGE_MODEL as CAUSAL_LANGUAGE_MODEL
    from fedelta.learning.kinds import IMAGE_CLASSIFICATION as IMAGE_CLASSIFICATION
    from fedelta.learning.kinds import MASKED_LANGUAGE_MODEL as MASKED_LANGUAGE_MODEL
    from fedelta.learning.kinds import SEQUENCE_TO_SEQUENCE as SEQUENCE_TO_SEQUENCE
    from fedelta.learning.kinds import TEXT_CLASSIFICATION as TEXT_CLASSIFICATION
    from fedelta.learning.kinds import TOKEN_CLASSIFICATION as TOKEN_CLASSIFICATION
    from fedelta.learning.lora import IA3 as IA3
    from fedelta.learning.lora import LoRA as LoRA
    from fedelta.learning.objectives import Classification as Classification
    from fedelta.learning.objectives import LanguageModel as LanguageModel
    from fedelta.learning.objectives import Regression as Regression
    from fedelta.learning.objectives import Tagging as Tagging
    from fedelta.learning.optimizers import SGD as SGD
    from fedelta.learning.optimizers import AdamW as AdamW
    from fedelta.learning.optimizers import Cosine as Cosine
    from fedelta.learning.optimizers import Exponential as Exponential
    from fedelta.learning.plan import Plan as Plan
    from fedelta.learning.pretrained import Pretrained as Pretrained
    from fedelta.learning.prompts import Prefix as Prefix
    from fedelta.learning.prompts import Prompt as Prompt
    from fedelta.learning.saving import load as load
    from fedelta.learning.saving import save as save
    from fedelta.learning.task import Task as Task
    from fedelta.learning.training import Training as Training
    from fedelta.learning.tuning import BitFit as BitFit
    from fedelta.learning.tuning import Full as Full
    from fedelta.learning.tuning import Head as Head
    from fedelta.learning.tuning import HeadAndNorms as HeadAndNorms
    from fedelta.learning.tuning import LastLayers as LastLayers
    from fedelta.learning.vision import Vision as Vision
    from fedelta.privacy.clipping import AdaptiveClip as AdaptiveClip
    from fedelta.privacy.distributed import DistributedDP as DistributedDP
    from fedelta.privacy.example_level import ExampleLevel as ExampleLevel
    from fedelta.privacy.ledger import FileLedger as FileLedger
    from fedelta.privacy.ledger import MemoryLedger as MemoryLedger
    from fedelta.privacy.ledger import verify as verify
    from fedelta.privacy.local_dp import LocalDP as LocalDP
    from fedelta.privacy.site_level import SiteLevel as SiteLevel
    from fedelta.secure.aggregation import SecureAggregation as SecureAggregation
    from fedelta.secure.aggregation import identities as identities
    from fedelta.secure.homomorphic import HomomorphicEncryption as HomomorphicEncryption
    from fedelta.secure.key_party import KeyParty as KeyParty
    from fedelta.secure.key_party import new_keys as new_keys
    from fedelta.statistics.columns import Category as Category
    from fedelta.statistics.columns import Number as Number
    from fedelta.statistics.columns import rows_of as rows_of
    from fedelta.statistics.program import Statistics as Statistics
    from fedelta.statistics.program import summarise as summarise

__version__ = "0.1.0"

_HOME = {
    "adapters.fed_sb": ["FedSB"],
    "adapters.fedbpt": ["FedBPT"],
    "adapters.fedex_lora": ["FedExLoRA"],
    "adapters.fedkseed": ["FedKSeed"],
    "adapters.fedsa_lora": ["FedSALoRA"],
    "adapters.ffa_lora": ["FFALoRA"],
    "adapters.flexlora": ["FlexLoRA"],
    "adapters.flora": ["FLoRA"],
    "adapters.offsite": ["Emulator", "Ends", "OffsiteTuning"],
    "adapters.rolora": ["RoLoRA"],
    "adapters.flora_na": ["FLoRANA"],
    "adapters.hetlora": ["HetLoRA"],
    "adapters.lora_fair": ["LoRAFAIR"],
    "aggregation.mean": ["Mean"],
    "aggregation.norm_bound": ["NormBound"],
    "algorithms.fedavg": ["FedAvg"],
    "algorithms.federation": ["Federation"],
    "algorithms.fedopt": ["FedAdagrad", "FedAdam", "FedAvgM", "FedOpt", "FedYogi"],
    "algorithms.fedprox": ["FedProx"],
    "algorithms.forecast": ["Link"],
    "algorithms.forecasting": ["forecast"],
    "algorithms.planning": ["planned"],
    "algorithms.sampling": ["All", "Cyclic", "Fixed", "Poisson"],
    "algorithms.stopping": ["Converged", "Target"],
    "core.examples": ["Examples"],
    "core.keys": ["new_key"],
    "core.parameters": ["Parameters"],
    "core.program": ["SiteData", "run"],
    "core.release": ["Budget", "Limit"],
    "data.audio": ["AudioFormat", "audio_format", "read_audio", "read_audio_folder"],
    "data.images": ["ImageFormat", "image_format", "read_image_folder", "read_images"],
    "data.partition": ["IID", "Dirichlet", "Quantity", "Shards"],
    "fleet.certificates": ["CertificateAuthority"],
    "fleet.local": ["Local"],
    "fleet.member": ["Member"],
    "fleet.remote": ["Remote"],
    "fleet.revocations": ["Revocations"],
    "fleet.wire": ["Credentials"],
    "fleet.workers": ["Workers"],
    "learning.closed_form": ["LDA", "Ridge"],
    "learning.bottleneck": ["Bottleneck"],
    "learning.lora": ["IA3", "LoRA"],
    "learning.kinds": [
        "AUDIO_CLASSIFICATION",
        "CAUSAL_LANGUAGE_MODEL",
        "IMAGE_CLASSIFICATION",
        "MASKED_LANGUAGE_MODEL",
        "SEQUENCE_TO_SEQUENCE",
        "TEXT_CLASSIFICATION",
        "TOKEN_CLASSIFICATION",
    ],
    "learning.objectives": ["Classification", "LanguageModel", "Regression", "Tagging"],
    "learning.optimizers": ["SGD", "AdamW", "Cosine", "Exponential"],
    "learning.plan": ["Plan"],
    "learning.pretrained": ["Pretrained"],
    "learning.task": ["Task"],
    "learning.training": ["Training"],
    "learning.prompts": ["Prefix", "Prompt"],
    "learning.saving": ["load", "save"],
    "learning.tuning": ["BitFit", "Full", "Head", "HeadAndNorms", "LastLayers"],
    "learning.vision": ["Vision"],
    "privacy.clipping": ["AdaptiveClip"],
    "privacy.distributed": ["DistributedDP"],
    "privacy.example_level": ["ExampleLevel"],
    "privacy.ledger": ["FileLedger", "MemoryLedger", "verify"],
    "privacy.local_dp": ["LocalDP"],
    "privacy.site_level": ["SiteLevel"],
    "secure.aggregation": ["SecureAggregation", "identities"],
    "secure.homomorphic": ["HomomorphicEncryption"],
    "secure.key_party": ["KeyParty", "new_keys"],
    "statistics.columns": ["Category", "Number", "rows_of"],
    "statistics.program": ["Statistics", "summarise"],
}
_MODULE_OF = {name: f"fedelta.{module}" for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedelta' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
