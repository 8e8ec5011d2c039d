"""What ``unidad --help`` says."""

DESCRIPTION = """Few-step few-shot image generation: distil a diffusion model to 1-4 steps and adapt it to a new
domain from about ten images, in one training run (Uni-DAD).

  unidad fit --config configs/quickstart.yaml           ten cartoon portraits with sunglasses, on any laptop
  unidad fit --config configs/quickstart.yaml --data.root FOLDER        your own images
  unidad fit --help                                     its options; those of a class: --model.help unidad_pl.UniDAD,
                                                        --data.help unidad_pl.FewShotDataModule
  unidad fit --config FILE --print_config               the whole config a run would use
  unidad test --config RUN/config.yaml --ckpt_path CHECKPOINT           metrics of it; validate and predict likewise
  unidad export --ckpt_path RUN/checkpoints/last.ckpt --out FOLDER      the student as a diffusers pipeline
  unidad sample --model FOLDER --num 64 --out IMAGES                    PNGs from it, or from a checkpoint
  unidad demo --model FOLDER                            a page to draw with it, on this machine ([demo])
  unidad study --config configs/study/stages.yaml       methods against each other, at equal compute
  unidad report RUN [RUN ...]                           one HTML page about a run, or several side by side
  unidad report memory --config FILE                                    peak GiB of a run, without its weights
  unidad report subjects --runs FOLDER                  CLIP-I, CLIP-T and DINO of many subjects' runs, one table
  unidad import adm --checkpoint FILE --preset ffhq256 --out FOLDER     a guided-diffusion model as a source model
  unidad restore adm --folder FOLDER --out FILE         what import adm wrote as a checkpoint of theirs again

Options may also come from the environment (UNIDAD_FIT__TRAINER__MAX_STEPS=100; configs and the command line win). What
cannot be done ends with one sentence, and 1 or, for a wrong command line, 2; --debug shows the traceback as well.
"""
