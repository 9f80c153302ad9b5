"""Seeing a run while it lasts: what it exports to Prometheus and TensorBoard, and the dashboards over it.

A step fills in `report.StepReport`; `monitor` turns it into metrics; `exporter` and `endpoint` serve them from a
process of their own. Nothing here may end a run, and nothing here changes what it computes.
"""
