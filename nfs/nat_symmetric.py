"""Symmetric NAT: as `nat`, with a translation for every connection; only who was addressed may answer, as with masquerading.

Address- and port-dependent mapping and filtering (RFC 4787, sections 4.1 and 5): the other party's address and port are part of
both keys, so clients may have the same external port towards different servers, and 64,512 ports are no limit. That is what RFC
4787 (REQ-1, REQ-3) and RFC 5382 (REQ-1, REQ-7) advise against and Linux does: it is here to be compared with. Hairpinning reaches
only who has sent to that very port before. All else, also verdicts in trouble, is as in `nat`.

    10.0.1.7:40002 -> 10.128.0.1:80     as 10.64.0.7:40002; 10.0.1.3:40002 -> 10.128.0.1:443 may be 10.64.0.7:40002, too
    10.128.0.1:81 -> 10.64.0.7:40002    DROP: nobody asked port 81
"""

from nfs._translation import MAPPING, SETTINGS, prepare, translate
from nfs.dataplane import FLOW, kind_of, network_function

KIND = kind_of("nat_symmetric", MAPPING)


@network_function(key=FLOW, state=MAPPING, passes=("not_ip",), rewrites=True, settings=SETTINGS, prepare=prepare)
def nat_symmetric(packet, mapping, env):
    return translate(packet, mapping, env, KIND, True)
