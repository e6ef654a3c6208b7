DEVICES=("cpu",)
def why_off(device): return "not written yet"
def about(): return ""
