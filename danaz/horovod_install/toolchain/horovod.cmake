# Toolchain file (CMAKE_TOOLCHAIN_FILE): CMake reads it before the project, so that Horovod's own sources stay as released.
# The standard's flag is known only once the compiler is, hence the hook that runs right after project(horovod).
set(CMAKE_PROJECT_horovod_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/after_project.cmake")
