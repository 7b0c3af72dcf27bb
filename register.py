"""Names on the command line → classes. A plugin adds its own: `TRAINERS["VREx"] = VREx`."""

from model import CNN, ERM, IRM, MLP, Backdoor, GroupDRO

TRAINERS = {"ERM": ERM, "groupDRO": GroupDRO, "IRM": IRM, "Backdoor": Backdoor}
NETWORKS = {"MLP": MLP, "CNN": CNN}
