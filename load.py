
import nbd,sys,hashlib,threading
uri=sys.argv[1]; jobs=int(sys.argv[2])
h=nbd.NBD(); h.connect_uri(uri)
for n in range(50): h.pwrite(bytes([n+1])*4096, n*4096)
bad=[]
for n in range(50):
    try: d=bytes(h.pread(4096,n*4096)); bad.append(hashlib.md5(d).hexdigest()[:6])
    except nbd.Error: bad.append("E")
print("".join(bad)[:0]+hashlib.md5("".join(bad).encode()).hexdigest(), bad.count("E"))
