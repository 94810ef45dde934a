"""BibTeX of the papers behind the trainers, for model cards."""


def _paper(key: str, title: str, authors: str, number: str, year: int) -> str:
    return (
        f"@misc{{{key},\n"
        f"    title = {{{{{title}}}}},\n"
        f"    author = {{{authors}}},\n"
        f"    year = {{{year}}},\n"
        f"    eprint = {{{number}}},\n"
        f"    archivePrefix = {{arXiv}},\n"
        f"    url = {{https://huggingface.co/papers/{number}}}\n"
        "}"
    )


DIFFUSION_DPO = _paper(
    "wallace2023diffusiondpo",
    "Diffusion Model Alignment Using Direct Preference Optimization",
    "Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and Senthil Purushwalkam and "
    "Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik",
    "2311.12908",
    2023,
)
PHYGDPO = _paper(
    "cai2025phygdpo",
    "PhyGDPO: Physics-Aware Groupwise Direct Preference Optimization for Physically Consistent Text-to-Video "
    "Generation",
    "Yuanhao Cai and Kunpeng Li and Menglin Jia and Jialiang Wang and Junzhe Sun and Feng Liang and Weifeng Chen and "
    "Felix Juefei-Xu and Chu Wang and Ali Thabet and Xiaoliang Dai and Xuan Ju and Alan Yuille and Ji Hou",
    "2512.24551",
    2025,
)
REG_DPO = _paper(
    "du2025regdpo",
    "Reg-DPO: SFT-Regularized Direct Preference Optimization with GT-Pair for Improving Video Generation",
    "Jie Du and Xinyu Gong and Qingshan Tan and Wen Li and Yangming Cheng and Weitao Wang and Chenlu Zhan and "
    "Suhui Wu and Hao Zhang and Jun Zhang",
    "2511.01450",
    2025,
)
VIDEOREPA = _paper(
    "zhang2025videorepa",
    "VideoREPA: Learning Physics for Video Generation through Relational Alignment with Foundation Models",
    "Xiangdong Zhang and Jiaqi Liao and Shaofeng Zhang and Fanqing Meng and Xiangpeng Wan and Junchi Yan and Yu Cheng",
    "2505.23656",
    2025,
)
