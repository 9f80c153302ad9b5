"""The names of all metrics."""

import re

from pipeline.measure.metrics import FAMILIES

CONTRACT = {
    "poa_images_total": (),
    "poa_step": (),
    "poa_step_seconds": (),
    "poa_phase_seconds_total": ("phase",),
    "poa_images_per_second": (),
    "poa_data_wait_ratio": (),
    "poa_model_flops_utilization_ratio": (),
    "poa_loss": ("term", "branch"),
    "poa_grad_norm": ("module",),
    "poa_learning_rate": (),
    "poa_teacher_momentum": (),
    "poa_teacher_temperature": (),
    "poa_device_memory_bytes": ("kind",),
    "poa_skipped_samples_total": ("reason",),
    "poa_bad_steps_total": ("term",),
    "poa_checkpoint_seconds": (),
    "poa_checkpoint_timestamp_seconds": (),
    "poa_checkpoint_bytes": (),
    "poa_target_entropy_nats": ("branch",),
    "poa_effective_rank": ("branch",),
    "poa_prototypes_used_ratio": ("branch",),
    "poa_knn_accuracy_ratio": ("subnet",),
    "poa_slowest_rank_step_seconds": (),
    "poa_restarts_total": (),
}


def test_the_contracts_metrics_exist_with_its_labels():
    assert {name: FAMILIES[name].labels for name in CONTRACT} == CONTRACT
    assert FAMILIES["poa_run_info"].labels[:2] == ("run", "family")


def test_names_follow_prometheus_conventions():
    for name, family in FAMILIES.items():
        assert re.fullmatch(r"poa_[a-z0-9_]+", name)
        assert name.endswith("_total") == (family.kind == "counter")
        assert "rank" not in family.labels
        assert "\n" not in family.help
