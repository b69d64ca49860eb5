/* What the bindings are made from, and why each header is needed. */

#include <linux/ioctl.h>	/* _IO, _IOR, _IOW, _IOWR: userfaultfd.h uses them without including them */
#include <linux/userfaultfd.h>	/* the interface itself */
#include <linux/fs.h>		/* PAGEMAP_SCAN: which pages were written since they were write-protected */
