import gc, pytest, os, socket
import tests.support.leaks as L
from tests.integration.test_registry_service import *
orig=L.Traces.since
n=0
def since(self, before):
    global n
    r=orig(self,before)
    if r and 'socket' in str(r):
        n+=1
        if n%100==50:
            print('LEAK',r)
            for o in gc.get_objects():
                m=str(getattr(type(o),'__module__',''))
                if isinstance(o,socket.socket): print('SOCK',o,[(type(r).__name__, str(r)[:100]) for r in gc.get_referrers(o)][:5])
                if 'grpc' in m and type(o).__name__ not in('type',):
                    print('OBJ', m, type(o).__name__, [(type(r).__name__, str(r)[:100]) for r in gc.get_referrers(o)][:5])
                if type(o).__name__ in ('coroutine','async_generator','Task','_UnixSelectorEventLoop') : print('CO', str(o)[:200], [(type(r).__name__, str(r)[:100]) for r in gc.get_referrers(o)][:4])
    return r
L.Traces.since=since
