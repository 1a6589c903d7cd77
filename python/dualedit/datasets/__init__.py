"""Facts to edit, read from the field's data sets or from a file of your own, in one schema.

    samples = load_samples("facts.jsonl")                        # your own
    samples = load_samples("vqa_eval.json", image_root="coco")   # E-VQA, E-IC, VLKEB, MMKE-Bench, OKEDIT
    editor.edit_many([s.request for s in samples])
    evaluate_single(editor, samples, "dualedit")

A file is a JSON list of objects or one object a line (JSONL). Image paths start from the file's own folder,
or from `image_root`; files are looked for when the samples are loaded and opened only when a probe's `.image`
is asked for.

Your own file (format "jsonl"; shown over several lines here, one line in the file):

    {"image": "photos/7.jpg", "prompt": "What brand is this computer?", "target": "lenovo",
     "rephrases": ["Who made this computer?"], "other_images": ["photos/8.jpg"],
     "keep": [{"image": "photos/9.jpg", "prompt": "What brand is this computer?", "answer": "acer"},
              {"prompt": "Who wrote Hamlet?", "answer": "shakespeare"}]}

    image          path; without it (or null) the edit is text only
    prompt         the question, required
    target         the new answer, required
    rephrases      other wordings that must give the target too (generality "t_gen"): texts, or objects with
                   prompt and, if it is not the edit's, image
    other_images   other images of the same thing (generality "v_gen"): paths, or objects with image and, if
                   it is not the edit's, prompt
    keep           questions whose answer must not change (locality): objects with prompt and, where there are
                   any, image, answer (which only training reads) and kind: t_loc, m_loc, hard_image or
                   hard_question. Without a kind it is t_loc without an image, hard_question with the edit's
                   image, hard_image with another image and the edit's question, and m_loc otherwise.
    portability    questions about what follows from the edit: objects with prompt, answer and, where there
                   are any, image and kind (a name of your choice; "port" without one)
    edit_rephrases wordings the editor may use while editing; keep them apart from "rephrases", which test it
    before         what the unedited model answers
    companions     further edits that a portability question presumes: objects with image, prompt, target
    id             the sample's name, unique; the row's number without one
    family, entity what the fact is about: a word, a number

E-VQA and E-IC (formats "evqa" and "eic", EasyEdit's files): src, pred, alt, rephrase, image, image_rephrase,
loc, loc_ans, m_loc, m_loc_q, m_loc_a. VLKEB ("vlkeb") adds port_new: portability by hop ("1-hop", ...), or,
where an entry holds port_edit_q and port_edit_a, portability "edit_onehop", whose i-th question presumes
companions[i] too. MMKE-Bench ("mmke") adds rel* (portability "t_rel", text only), m_rel* ("m_rel" with the
edit's image, "v_rel" with the rephrased one) and port_new, asked about one_hop_img where there is one.

OKEDIT ("okedit"). The paper does not publish field names; this library's are

    image, question, target            the edit
    prediction                         what the unedited model answers, optional
    rephrased_questions                list (the paper has 10), generality "t_gen"
    rephrased_images                   list (the paper has 10), generality "v_gen"
    locality_image, locality_answer    a look-alike and the right answer about it, locality "hard_image";
                                       asked with `question`, or `locality_question` where there is one
    id                                 optional
"""

from .images import check_images, missing_images
from .loading import FORMATS, LoadedSamples, from_records, load_samples
from .overlap import Overlap, overlap
from .rows import Problem
from .templates import TEMPLATES, PromptTemplate
from .writing import to_jsonl

__all__ = [
    "FORMATS",
    "TEMPLATES",
    "LoadedSamples",
    "Overlap",
    "Problem",
    "PromptTemplate",
    "check_images",
    "from_records",
    "load_samples",
    "missing_images",
    "overlap",
    "to_jsonl",
]
