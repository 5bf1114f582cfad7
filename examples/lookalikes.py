"""What looks like the galaxy at a position, what kinds are these, and how bright are they beside all others?

python examples/lookalikes.py STORE LABELS RA DEC OUT.png, with RA and DEC in degrees and a table of `kind` by id.
"""

import sys

import astropy.units as u
import matplotlib.pyplot as plt
import numpy as np
from astropy.coordinates import SkyCoord

import galembed
from galembed.probes import fit_probe

store_path, labels, ra, dec, out = sys.argv[1:]
position = SkyCoord(float(ra) * u.deg, float(dec) * u.deg)
bright = "mag_r < 20"

store = galembed.open(store_path)
hits = store.similar(to=position, k=15, where=bright)
hits["separation"] = SkyCoord(hits["ra"], hits["dec"]).separation(position).to(u.arcsec)
print(hits["source_id", "similarity", "separation", "mag_r", "redshift"])

probe, scores = fit_probe(store, labels, "kind", curve=False)
print(f"balanced accuracy {scores.balanced_accuracy:.2f}, by chance {scores.chance:.2f}")
keys, vectors = store.vectors(where=bright)
predicted = np.array(probe.classes)[probe.predict(vectors).argmax(axis=1)]
of_hit = np.isin(keys["source_id"], hits["source_id"])
for kind in probe.classes:
    print(f"{kind:20} {np.mean(predicted[of_hit] == kind):5.0%} of the hits, {np.mean(predicted == kind):5.0%} of all")

everything = np.concatenate([batch["mag_r"].to_numpy() for batch in store.batches(["mag_r"], where=bright)])
bins = np.arange(np.floor(everything.min()), 20.5, 0.5)
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.hist(everything, bins, density=True, histtype="step", label=f"all {len(everything)} of the store")
axes.hist(np.asarray(hits["mag_r"]), bins, density=True, alpha=0.5, label=f"{len(hits)} that look alike")
axes.set_xlabel("r (AB mag)")
axes.set_ylabel("share per mag")
axes.legend()
figure.savefig(out)
