"""What an adapter can do with its files: write them, with a model card, and push them to the Hub."""

import shutil
import tempfile
from collections.abc import Collection, Sequence
from os import PathLike
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn

from . import hub, model_card, storage
from .base_model import BaseRecord
from .freezing import base_dtype
from .manifest import Manifest, current_versions
from .planning import AdapterSpec, count_base
from .seeds import Seed
from .sites import PlannedSite


class AdapterFiles:
    """
    The part of an adapter that writes its files. A subclass has the attributes and the first methods.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The model.
        spec ([`AdapterSpec`]): The definition of the adapter.
        seeds (`dict[str, Seed]`): For Mo-SARA, the seeds that identify the frozen factors of each site.
    """

    model: nn.Module
    spec: AdapterSpec
    seeds: dict[str, Seed]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the trained tensors on the CPU."""
        raise NotImplementedError

    def saved_factors(self) -> dict[str, torch.Tensor]:
        """The frozen factors that are saved with the adapter. There are none if seeds are saved instead."""
        raise NotImplementedError

    def untrained_sites(self) -> list[PlannedSite]:
        """The sites whose updates took no part in the training, although others did."""
        raise NotImplementedError

    def refuse_others(self) -> None:
        """Raise a `ValueError` if a parameter trains that no adapter of the model holds."""
        raise NotImplementedError

    def warn_of_idle(self, sites: Sequence[PlannedSite]) -> None:
        """Say once that the updates of sites add nothing."""
        raise NotImplementedError

    def manifest(self, untrained: Collection[PlannedSite] = ()) -> Manifest:
        """
        The description of the adapter that its files hold besides its tensors.

        Args:
            untrained (`Collection[PlannedSite]`, *optional*): The sites whose tensors are those of their start.
        """
        base, versions = BaseRecord.of(self.model, base_dtype(self.model)), current_versions()
        names = frozenset(site.name for site in untrained)
        spec = self.spec
        return Manifest(spec.args, spec.threshold, spec.sites, spec.parts, self.seeds, base, versions, untrained=names)

    def save_pretrained(self, folder: str | PathLike) -> None:
        """
        Write the adapter's files, of which none is a pickle. A crash leaves either the old adapter or the new one, but
        never a mix. A model card in the folder is written anew, since it is that of an earlier adapter. Updates that
        were never used in a training are marked, and add nothing when the adapter is loaded.

        Args:
            folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.

        Raises:
            [`AdapterError`]: If a trained tensor is empty or not finite. Nothing is written then.
            `ValueError`: If a parameter trains that no adapter of the model holds.
        """
        self.refuse_others()
        self.write_files(folder)

    def write_files(self, folder: str | PathLike) -> None:
        """What [`SaraAdapter.save_pretrained`] does after it has looked for parameters that would be lost."""
        untrained = self.untrained_sites()
        storage.write(folder, self.manifest(untrained), self.state_dict(), self.saved_factors())
        if model_card.has_generated_card(folder):
            # It is that of the adapter that was here before.
            self.write_card(folder)
        self.warn_of_idle(untrained)

    def write_card(self, folder: str | PathLike, *, tags: str | Sequence[str] = (), **card: Any) -> None:
        """
        Write the model card, with its figures, beside the adapter's files.

        Args:
            folder (`str` or `os.PathLike`): The folder that [`SaraAdapter.save_pretrained`] wrote.
            tags (`str` or `Sequence[str]`, *optional*): Tags besides hf_sara's own and the model's `model_tags`.
            card: Passed on to [`~hf_sara.model_card.make_card`]: `language`, `license`, `datasets`, `results`, ...
        """
        tags = [*model_card.listed(tags), *model_card.listed(getattr(self.model, "model_tags", None))]
        model_card.write_card(folder, self.manifest(), count_base(self.model), tags=tags, **card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        **card: Any,
    ) -> CommitInfo:
        """
        Push the adapter and its model card to the Hub, in one commit. The repository is made if it does not exist.

        Args:
            repo_id (`str`): The repository to push to: `"user/name"`.
            commit_message (`str`, *optional*, defaults to `"Upload adapter"`): Message of the commit.
            private (`bool`, *optional*): Whether a new repository is private.
            revision (`str`, *optional*): Branch to push to. It is made if it does not exist. Defaults to the main
                branch.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of pushing to the branch.
            token (`str`, *optional*): Token with write access; defaults to the one of `hf auth login`.
            card: Passed on to [`~hf_sara.model_card.make_card`]: `language`, `license`, `tags`, `datasets`, ...

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit, with `pr_url` for a pull request.

        Raises:
            `OSError`: If the push failed. The adapter then lies in a folder that the message names, to be pushed
                later.
            `ValueError`: If `repo_id` is not the name of a repository.
        """
        hub.check_repo_id(repo_id)
        folder = tempfile.mkdtemp(prefix="hf_sara-")
        self.save_pretrained(folder)
        self.write_card(folder, repo_id=repo_id, **card)
        info = hub.push_folder(
            folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
        )
        # The push is done, whether or not the folder can be deleted.
        shutil.rmtree(folder, ignore_errors=True)
        return info
