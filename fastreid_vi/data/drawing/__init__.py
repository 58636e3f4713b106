"""Drawing the stand-in data set: `pedestrian` says who walks there, `scene` takes the picture."""
