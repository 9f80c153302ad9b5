from pipeline.config import parse_config
from pipeline.data.loader import Loader
from pipeline.report.pictures import IMAGES, as_colours, crops_as_seen, picture


def test_crops_are_those_of_the_first_rank_in_lanes_too(experiment, tmp_path):
    config = parse_config(experiment(data={"lanes": 2, "batch_size": 6}, loss={"ibot_weight": 0}))
    html = crops_as_seen(config, step=3, world_size=2, run=tmp_path)
    loader = Loader(config.data, rank=0, world_size=2, start_sample=3 * 6 * 2)
    crops = as_colours(next(loader).global_crops, loader.intake)
    loader.close()
    assert all(picture(crop) in html for crop in crops[: 2 * IMAGES])
    assert picture(crops[2 * IMAGES]) not in html
